/** The noise of the format: Philox4x32-10 and a table of normal quantiles, section 9. */

import { digest } from "./reader.ts";

const [M0, M1] = [0xd2511f53, 0xcd9e8d57];
const [W0, W1] = [0x9e3779b9, 0xbb67ae85];
const ROUNDS = 10;
const STEPS = 256; // draws of an epoch
export const CODEBOOKS = (2 ** 24 - 1) * STEPS; // the first draw of the last epoch
const TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8";

/** Return the words of Philox4x32-10 for a counter and a key. */
export function philox(counter: ArrayLike<number>, key: ArrayLike<number>): Uint32Array {
  let [x0, x1, x2, x3] = [counter[0], counter[1], counter[2], counter[3]];
  let [k0, k1] = [key[0], key[1]];
  for (let round = 0; round < ROUNDS; round++) {
    const [a, b] = [high(x0, M0), high(x2, M1)];
    [x0, x1, x2, x3] = [b ^ x1 ^ k0, Math.imul(x2, M1), a ^ x3 ^ k1, Math.imul(x0, M0)];
    [k0, k1] = [(k0 + W0) >>> 0, (k1 + W1) >>> 0];
  }
  return Uint32Array.of(x0, x1, x2, x3);
}

/** Return the upper word of a product of 32-bit words. */
function high(a: number, b: number): number {
  const [a0, a1, b0, b1] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const carry = a0 * b1 + (middle % 65536);
  return (a1 * b1 + Math.floor(middle / 65536) + Math.floor(carry / 65536)) >>> 0;
}

/** Return the table of all quantiles from the file of their upper half, little-endian float32. */
export async function quantiles(upper: Uint8Array): Promise<Float32Array> {
  const half = upper.length / 4;
  const [view, bytes] = [new DataView(upper.buffer, upper.byteOffset), new Uint8Array(8 * half)];
  const whole = new DataView(bytes.buffer);
  const table = new Float32Array(2 * half);
  for (let i = 0; i < 2 * half; i++) {
    table[i] = i < half ? -view.getFloat32(4 * (half - 1 - i), true) : view.getFloat32(4 * (i - half), true);
    whole.setFloat32(4 * i, table[i], true);
  }
  if ((await digest(bytes)) !== TABLE_SHA256) throw new Error("the table of quantiles is damaged");
  return table;
}

/** The noise of one seed. */
export class Noise {
  private readonly key: Uint32Array;

  constructor(
    private readonly table: Float32Array,
    seed: string,
  ) {
    this.key = Uint32Array.of(parseInt(seed.slice(8), 16), parseInt(seed.slice(0, 8), 16));
  }

  /** Write the noise of an image into `out`. */
  fill(out: Float32Array, draw: number, classWord: number, imageWord: number): void {
    const counter = Uint32Array.of(draw, classWord, imageWord, 0);
    for (let at = 0; at < out.length; at += 8, counter[3]++) {
      const words = philox(counter, this.key);
      for (let i = 0; i < 8 && at + i < out.length; i++) {
        out[at + i] = this.table[i % 2 ? words[i >> 1] >>> 16 : words[i >> 1] & 0xffff];
      }
    }
  }

  /** Write an entry of the codebook of a level. */
  entry(out: Float32Array, level: number, atom: number): void {
    this.fill(out, CODEBOOKS + level, 0, atom);
  }
}
