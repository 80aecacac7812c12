/** Samplers as tables of steps, section 5. */

import { type JsonObject, Real } from "./json.ts";

/** x' = a * x + sum b[j] * (x0 of j calls ago) + c * fresh noise. */
export interface Step {
  a: number;
  b: number[];
  c: number;
}

/** The prediction of x0 for x at a sigma. */
export type Model = (x: Float32Array, sigma: number) => Promise<Float32Array>;
/** The noise of a draw; 0 starts an image. */
export type Draw = (index: number) => Float32Array;

const number = (value: unknown) => (value instanceof Real ? value.value : (value as number));

/** Return the steps of a sampler over sigmas. */
export function plan(sampler: string, sigmas: number[], extra: JsonObject): Step[] {
  const pairs = sigmas.slice(1).map((low, i) => [sigmas[i], low]);
  if (sampler === "table") {
    const rows = extra.get("table") as [unknown, unknown[]][];
    return rows.map(([a, b]) => ({ a: number(a), b: b.map(number), c: 0 }));
  }
  if (sampler === "ancestral") {
    const eta = number(extra.get("eta"));
    return pairs.map(([s, t]) => {
      const c = Math.min(t, eta * ((t * Math.sqrt(s * s - t * t)) / s));
      const kept = Math.sqrt(t * t - c * c);
      return { a: kept / s, b: [1 - kept / s], c };
    });
  }
  if (sampler === "lcm") return pairs.map(([, t]) => ({ a: 0, b: [1], c: t }));
  if (sampler === "dpmpp-2m") return pairs.map(([s, t], i) => secondOrder(sigmas[i - 1], s, t));
  return pairs.map(([s, t]) => ({ a: t / s, b: [1 - t / s], c: 0 })); // ddim, euler
}

function secondOrder(before: number | undefined, s: number, t: number): Step {
  const gain = 1 - t / s;
  if (before === undefined || t === 0) return { a: t / s, b: [gain], c: 0 };
  const half = (0.5 * Math.log(s / t)) / Math.log(before / s);
  return { a: t / s, b: [gain * (1 + half), -gain * half], c: 0 };
}

/** Return x0 by a table of steps. Every product and every sum is rounded to float32. */
export async function sample(steps: Step[], sigmas: number[], model: Model, draw: Draw): Promise<Float32Array> {
  let x = scaled(draw(0), Math.sqrt(sigmas[0] ** 2 + 1));
  const reach = Math.max(...steps.map((step) => step.b.length));
  let calls: Float32Array[] = []; // newest first
  for (const [i, step] of steps.entries()) {
    calls = [await model(x, sigmas[i]), ...calls].slice(0, reach);
    const weighted = scaled(calls[0], step.b[0]);
    x = step.a ? add(scaled(x, step.a), weighted) : weighted;
    step.b.slice(1).forEach((weight, j) => {
      if (calls[j + 1]) add(x, scaled(calls[j + 1], weight));
    });
    if (step.c) add(x, scaled(draw(i + 1), step.c));
  }
  return x;
}

/** Return the product with a number, which is rounded to float32 first, as tensors do. */
export function scaled(x: Float32Array, factor: number): Float32Array {
  const f = Math.fround(factor);
  return x.map((value) => value * f);
}

/** Add in place. */
export function add(x: Float32Array, y: Float32Array): Float32Array {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}
