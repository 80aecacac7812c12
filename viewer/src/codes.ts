/** Codes: single images as choices among noise, section 6a. */

import { bitsAt, combinations } from "./bits.ts";
import type { JsonObject } from "./json.ts";
import type { Noise } from "./noise.ts";
import { codeWidths } from "./reader.ts";
import { add, scaled } from "./samplers.ts";

/** What one level of a code chooses: ascending entries of its codebook, each with a sign. */
export interface Choice {
  atoms: number[];
  signs: number[];
}

/** Return the choices of a code of a class, level by level. */
export function choicesOf(row: Uint8Array, code: number, params: JsonObject): Choice[] {
  const [counts, widths] = [params.get("atoms") as number[], codeWidths(params)];
  const entries = 2 ** (params.get("bits") as number);
  let at = code * widths.reduce((sum, width) => sum + width, 0);
  return counts.map((count, level) => {
    const value = bitsAt(row, at, widths[level]);
    at += widths[level];
    const signs = Array.from({ length: count }, (_, i) => ((value >> BigInt(i)) & 1n ? -1 : 1));
    return { atoms: setOf(value >> BigInt(count), entries, count), signs };
  });
}

/** Return the ascending set of a rank: C(a1, 1) + C(a2, 2) + ... + C(am, m). */
export function setOf(rank: bigint, entries: number, count: number): number[] {
  const atoms: number[] = [];
  let a = entries - 1;
  let sets = combinations(a, count); // C(a, i)
  for (let i = count; i > 0; i--) {
    while (sets > rank) {
      sets = (sets * BigInt(a - i)) / BigInt(a);
      a -= 1;
    }
    atoms.unshift(a);
    rank -= sets;
    sets = a ? (sets * BigInt(i)) / BigInt(a) : 0n;
    a -= 1;
  }
  return atoms;
}

/** Write the noise that a choice stands for. */
export function chosenNoise(noise: Noise, level: number, { atoms, signs }: Choice, out: Float32Array): void {
  const entry = new Float32Array(out.length);
  out.fill(0);
  atoms.forEach((atom, i) => {
    noise.entry(entry, level, atom);
    add(out, scaled(entry, signs[i]));
  });
  if (atoms.length > 1) out.set(scaled(out, 1 / Math.sqrt(atoms.length)));
}
