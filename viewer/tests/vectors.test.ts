/** Noise, codes, samplers, prompts, labels and text: the bits that d3pack computes. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { singles } from "../src/bits.ts";
import { choicesOf, chosenNoise } from "../src/codes.ts";
import { decodePrompts, ledgerOf, params, rowOf, softLabels, sourceOf, weightsOf } from "../src/content.ts";
import { type Json, parse, Real } from "../src/json.ts";
import { Levels } from "../src/levels.ts";
import { Noise, philox, quantiles } from "../src/noise.ts";
import { digest, read } from "../src/reader.ts";
import { plan, sample } from "../src/samplers.ts";
import { Tokenizer } from "../src/tokenizer.ts";

const HERE = import.meta.dirname;
const ROOT = join(HERE, "../..");
const bytes = (path: string) => new Uint8Array(readFileSync(join(ROOT, path)));
const VECTORS = JSON.parse(readFileSync(join(HERE, "../tests/vectors.json"), "utf8"));
const SIZE = VECTORS.shape.reduce((size: number, side: number) => size * side, 1);
const TABLE = await quantiles(bytes("d3pack/decode/normal16.f32"));
const bits = (values: Float32Array) => digest(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));

test("Philox gives the words of the specification", () => {
  const spec = readFileSync(join(ROOT, "spec/d3m-1.md"), "utf8");
  const row = /^\| ((?:[0-9a-f]{8} ?){4}) \| ((?:[0-9a-f]{8} ?){2}) \| ((?:[0-9a-f]{8} ?){4}) \|$/gm;
  const words = (text: string) => text.split(" ").map((word) => parseInt(word, 16));
  const found = [...spec.matchAll(row)];
  assert.equal(found.length, 3);
  for (const [, counter, key, out] of found) {
    assert.deepEqual([...philox(words(counter), words(key))], words(out));
  }
});

test("noise has the same bits", async () => {
  for (const { seed, draw, class: c, image, first, sha256 } of VECTORS.noise) {
    const out = new Float32Array(SIZE);
    new Noise(TABLE, seed).fill(out, draw, c, image);
    assert.deepEqual([...out.subarray(0, 4)], first);
    assert.equal(await bits(out), sha256);
  }
});

for (const [name, { extra, first, sha256 }] of Object.entries<any>(VECTORS.samplers)) {
  test(`the sampler ${name} has the same bits`, async () => {
    const noise = new Noise(TABLE, "0000000000000005");
    const draw = (step: number) => {
      const out = new Float32Array(2 * SIZE);
      noise.fill(out.subarray(0, SIZE), step, 1, 3);
      noise.fill(out.subarray(SIZE), step, 2, 4);
      return out;
    };
    const model = async (x: Float32Array, sigma: number) => {
      const shift = Math.fround(sigma * 0.125);
      return x.map((value) => value * 0.75).map((value) => value - shift);
    };
    const settings = parse(JSON.stringify(extra)) as Map<string, Json>;
    const x = await sample(plan(name, VECTORS.sigmas, settings), VECTORS.sigmas, model, draw);
    assert.deepEqual([...x.subarray(0, 4)], first);
    assert.equal(await bits(x), sha256);
  });
}

for (const [name, expected] of Object.entries<any>(VECTORS.content)) {
  test(`the content of ${name} is the same`, async () => {
    const pack = await read(bytes(`spec/vectors/valid/${name}.d3m`));
    const classes = pack.names.map((_, c) => c);
    const sources = classes.flatMap((c) => Array.from({ length: pack.imagesPerClass }, (_, j) => sourceOf(pack, c, j)));
    assert.deepEqual(sources.map(({ classWord, imageWord }) => [classWord, imageWord]), expected.words);
    assert.deepEqual(sources.slice(0, pack.imagesPerClass).map(({ mode }) => mode), expected.modes);
    assert.deepEqual(Object.fromEntries(ledgerOf(pack)), expected.ledger);
    for (const section of ["prompts", "unconditional"]) {
      assert.equal(pack.sections.has(section), section in expected);
      if (section in expected) assert.equal(await bits(decodePrompts(pack, section)), expected[section]);
    }
    const labels = classes.flatMap((c) => softLabels(pack, c) ?? []);
    assert.equal(labels.length > 0, "labels" in expected);
    if (labels.length) assert.equal(await bits(Float32Array.from(labels.flatMap((label) => [...label]))), expected.labels);
    const weights = classes.flatMap((c) => [...(weightsOf(pack, c) ?? [])]);
    assert.equal(weights.length > 0, "weights" in expected);
    if (weights.length) assert.equal(await bits(Float32Array.from(weights)), expected.weights);
    const coding = params(pack, "codes");
    if (coding) {
      const noise = new Noise(TABLE, pack.manifest.get("seed") as string);
      const last = rowOf(pack, "codes.bits", pack.names.length - 1);
      const choices = choicesOf(last, (coding.get("codes") as number) - 1, coding);
      for (const [level, choice] of choices.entries()) {
        const out = new Float32Array(SIZE);
        chosenNoise(noise, level, choice, out);
        assert.equal(choice.atoms.length ? await bits(out) : "", expected.codes[level]);
      }
    }
  });
}

test("timesteps, inputs and predictions have the same bits", async () => {
  const levels = new Levels(VECTORS.mini.sigmas, VECTORS.mini.prediction);
  const [x, out] = [0, 1].map((image) => {
    const values = new Float32Array(SIZE);
    new Noise(TABLE, "0000000000000001").fill(values, 0, 0, image);
    return values;
  });
  for (const { sigma, timestep, input, x0 } of VECTORS.mini.levels) {
    assert.ok(Math.abs(levels.timestep(sigma) - timestep) < 1e-9);
    assert.equal(await bits(levels.input(x, sigma)), input);
    assert.equal(await bits(levels.denoised(x, sigma, out)), x0);
  }
});

test("the tokenizer reads the same ids", () => {
  const tokenizer = new Tokenizer(JSON.parse(readFileSync(join(ROOT, "mini/d3pack_mini/weights/tokenizer/tokenizer.json"), "utf8")));
  for (const [text, ids] of Object.entries(VECTORS.mini.texts)) assert.deepEqual(tokenizer.ids(text), ids, text);
});

test("numbers of a table may be integers", () => {
  const [step] = plan("table", [1, 0], new Map([["table", [[1, [new Real(0.5)]]]]]));
  assert.deepEqual(step, { a: 1, b: [0.5], c: 0 });
});

test("half precision becomes single precision", () => {
  const halves = Uint16Array.of(0x3c00, 0xc000, 0x7bff, 0x0001, 0x83ff, 0x8000, 0x7c00, 0x3555);
  const expected = [1, -2, 65504, 2 ** -24, -1023 * 2 ** -24, -0, Infinity, 1365 * 2 ** -12];
  assert.deepEqual([...singles(new Uint8Array(halves.buffer))], expected);
});
