/** Noise levels of a diffusion model: what it takes at a sigma, and what its output means there. */

import { scaled } from "./samplers.ts";

const CLOSE = 1e-5; // relative distance in sigma below which an entry of the table is meant

export class Levels {
  constructor(
    readonly sigmas: number[], // of the training timesteps, ascending
    readonly prediction: string,
  ) {}

  /** Return the timestep of a sigma: a whole one where the table has it, else between two. */
  timestep(sigma: number): number {
    const at = Math.log(sigma);
    const logs = this.sigmas.map(Math.log);
    const gaps = logs.map((value) => Math.abs(value - at));
    const nearest = gaps.indexOf(Math.min(...gaps));
    if (Math.abs(sigma - this.sigmas[nearest]) <= CLOSE * this.sigmas[nearest]) return nearest;
    if (at <= logs[0]) return 0;
    if (at >= logs[logs.length - 1]) return logs.length - 1;
    const above = logs.findIndex((value) => value > at);
    return above - 1 + (at - logs[above - 1]) / (logs[above] - logs[above - 1]);
  }

  /** Return x_t, which the model takes, from x = x0 + sigma * eps. */
  input(x: Float32Array, sigma: number): Float32Array {
    const divisor = Math.fround(Math.sqrt(sigma ** 2 + 1));
    return x.map((value) => value / divisor);
  }

  /** Return x0 from x and the model's output there. */
  denoised(x: Float32Array, sigma: number, out: Float32Array): Float32Array {
    if (this.prediction === "sample") return out;
    if (this.prediction === "epsilon") return subtract(x, scaled(out, sigma));
    const scale = 1 / Math.sqrt(sigma ** 2 + 1);
    return subtract(scaled(x, scale * scale), scaled(out, sigma * scale));
  }
}

function subtract(x: Float32Array, y: Float32Array): Float32Array {
  return x.map((value, i) => value - y[i]);
}
