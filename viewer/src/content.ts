/** What the sections of a verified pack mean: prompts, counters, labels, probes, bytes. */

import { smallBitsAt } from "./bits.ts";
import { canonical, type Json, type JsonObject, quote, Real } from "./json.ts";
import { type Pack, rows, type Section, topKRecords, type Values } from "./reader.ts";

/** What the noise and the prompt of an image are. */
export interface Source {
  classWord: number;
  imageWord: number;
  mode: number;
  code: number | undefined;
}

export const params = (pack: Pack, section: string): JsonObject | undefined => pack.sections.get(section)?.params;
export const real = (value: Json | undefined): number => (value instanceof Real ? value.value : (value as number));
export const recipe = (pack: Pack): JsonObject => pack.manifest.get("recipe") as JsonObject;

/** Return the vectors of prompts, float32 (C, m, k, D). */
export function decodePrompts(pack: Pack, name = "prompts"): Float32Array {
  const section = pack.sections.get(name) as Section;
  const width = (section.params.get("shape") as number[])[2];
  const tensor = (part: string) => pack.arrays.get(`${name}.${part}`) as Values;
  if (section.codec === "f16") return tensor("values") as Float32Array;
  const scales = tensor("scales") as Float32Array;
  const codes = tensor("codes");
  if (section.codec === "i8") return Float32Array.from(codes, (code, i) => code * scales[Math.floor(i / width)]);
  const step = section.params.get(section.codec === "i4" ? "group" : "dim") as number;
  const parts = Math.ceil(width / step);
  const count = section.codec === "i4" ? scales.length / parts : scales.length;
  const out = new Float32Array(count * width);
  for (let i = 0; i < out.length; i++) {
    const [vector, d] = [Math.floor(i / width), i % width];
    if (section.codec === "i4") {
      const byte = codes[vector * Math.ceil(width / 2) + (d >> 1)];
      out[i] = ((d % 2 ? byte >> 4 : byte & 15) - 8) * scales[vector * parts + Math.floor(d / step)];
    } else {
      const code = codes[vector * parts + Math.floor(d / step)];
      out[i] = (tensor("codebook") as Float32Array)[code * step + (d % step)] * scales[vector];
    }
  }
  return out;
}

/** Return what image j of class c is made of. */
export function sourceOf(pack: Pack, c: number, j: number): Source {
  const classWord = (pack.arrays.get("ids.ids") as Uint32Array | undefined)?.[c] ?? c;
  const modes = (params(pack, "prompts")?.get("shape") as number[] | undefined)?.[0] ?? 1;
  const coding = params(pack, "codes");
  const coded = (coding?.get("images") as number | undefined) ?? 0;
  if (coding && j < coded) {
    const code = j % (coding.get("codes") as number);
    return { classWord, imageWord: j, mode: code % modes, code };
  }
  const i = j - coded;
  return { classWord, imageWord: pickOf(pack, c, i), mode: i % modes, code: undefined };
}

function pickOf(pack: Pack, c: number, i: number): number {
  const picks = params(pack, "picks");
  if (!picks) return i;
  const [bits, lanes] = [picks.get("bits") as number, picks.get("lanes") as number | undefined];
  if (lanes === undefined) return i + (picks.get("stride") as number) * smallBitsAt(rowOf(pack, "picks.codes", c), 0, bits);
  return (i % lanes) + lanes * smallBitsAt(rowOf(pack, "picks.codes", c), i * bits, bits);
}

/** Return the bytes of a class of a tensor. */
export function rowOf(pack: Pack, name: string, c: number): Uint8Array {
  const values = pack.arrays.get(name) as Uint8Array;
  const size = values.length / pack.names.length;
  return values.subarray(c * size, (c + 1) * size);
}

/** Return the soft labels of the images of a class, or undefined where labels are hard. */
export function softLabels(pack: Pack, c: number): Float32Array[] | undefined {
  const section = pack.sections.get("labels");
  if (!section) return undefined;
  const [classes, images] = [pack.names.length, pack.imagesPerClass];
  if (section.codec === "dense") {
    const row = [...rows(pack.arrays.get("labels.probs") as Float32Array, classes)][c];
    return Array.from({ length: images }, (_, j) => normalised(row.subarray(j * classes, (j + 1) * classes)));
  }
  const bytes = rowOf(pack, "labels.bits", c);
  const ratios = ratioTable(section.params.get("bits") as number, section.params.get("octaves") as number);
  const records = topKRecords(bytes, classes, images, section.params);
  return Array.from(records, ({ indices, codes }) => topKLabel(indices, codes, ratios, classes));
}

function normalised(probs: Float32Array): Float32Array {
  const sum = probs.reduce((total, x) => total + x, 0);
  return probs.map((x) => x / sum);
}

function ratioTable(bits: number, octaves: number): number[] {
  const last = 2 ** bits - 1;
  return Array.from({ length: last + 1 }, (_, q) => (q < last ? 2 ** (-(q * octaves) / (last - 1)) : 0));
}

function topKLabel(indices: number[], codes: number[], ratios: number[], classes: number): Float32Array {
  const tail = ratios[codes[codes.length - 1]];
  const top = [1, ...codes.slice(0, -1).map((code) => ratios[code])];
  const total = top.reduce((sum, ratio) => sum + ratio, 0);
  const label = new Float32Array(classes).fill(classes > indices.length ? tail / (classes - indices.length) : 0);
  indices.forEach((index, rank) => (label[index] = ((1 - tail) * top[rank]) / total));
  return label;
}

/** Return how much each image of a class counts in the loss of a training, or undefined where all count the same. */
export function weightsOf(pack: Pack, c: number): Float32Array | undefined {
  if (!pack.sections.has("weights")) return undefined;
  return Float32Array.from(rowOf(pack, "weights.codes", c), (code) => 2 ** ((code - 128) / 16));
}

/** Return the bytes of a file by what they are spent on; they add up to its size. */
export function ledgerOf(pack: Pack): [string, number][] {
  const spent = new Map<string, number>();
  const count = (name: string, bytes: number) => spent.set(name, (spent.get(name) ?? 0) + bytes);
  for (const [name, section] of pack.sections) {
    const [from, to] = section.shared;
    if (name !== "leaves") count(name, to - from + pack.names.length * section.row);
  }
  for (const name of ["recipe", "provenance", "optional"]) {
    const value = pack.written.get(name);
    if (value !== undefined) count(name, quote(canonical(value)).length - 2); // in the header
  }
  const counted = [...spent.values()].reduce((sum, bytes) => sum + bytes, 0);
  count("container", pack.bytes - counted);
  return [...spent].sort((a, b) => b[1] - a[1]);
}
