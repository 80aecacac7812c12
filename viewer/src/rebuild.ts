/** From (class, index) to pixels, as the decoder of d3pack does it, with any networks. */

import { type Choice, choicesOf, chosenNoise } from "./codes.ts";
import { decodePrompts, params, real, recipe, rowOf, type Source, sourceOf } from "./content.ts";
import type { JsonObject } from "./json.ts";
import type { Levels } from "./levels.ts";
import type { Noise } from "./noise.ts";
import type { Pack } from "./reader.ts";
import { plan, sample, type Step } from "./samplers.ts";
import type { Tokenizer } from "./tokenizer.ts";

export type Pair = [number, number]; // class, index within the class

/** What `model.json` says about the backbone. */
export interface ModelInfo {
  channels: number;
  factor: number;
  files: Record<string, [number, string]>;
  lock: string;
  pad: number;
  positions: number;
  prediction: string;
  sigmas: number[];
  step: number;
  width: number;
}

/** The networks of a backbone. */
export interface Networks {
  encode(ids: number[], vectors: Float32Array, learned: Float32Array): Promise<Float32Array>;
  denoise(x: Float32Array, shape: number[], timestep: number, hidden: Float32Array, tokens: number): Promise<Float32Array>;
  decode(latents: Float32Array, shape: number[]): Promise<Float32Array>;
}

export interface Parts {
  info: ModelInfo;
  levels: Levels;
  networks: Networks;
  noise: Noise;
  tokenizer: Tokenizer;
}

/** Return why the page cannot make the images of a pack, or nothing. */
export function obstacle(pack: Pack, info: Pick<ModelInfo, "factor" | "lock" | "step" | "width">): string {
  const { size, template } = Object.fromEntries(recipe(pack)) as { size: number[]; template: string | null };
  const backbone = recipe(pack).get("backbone") as JsonObject;
  const unit = info.factor * info.step;
  const shape = (params(pack, "prompts") ?? params(pack, "unconditional"))?.get("shape") as number[] | undefined;
  if (backbone.get("lock") !== info.lock) {
    const name = String(backbone.get("repo")) || String(backbone.get("kind"));
    return `The pack names another backbone than the one of this page: ${name}, lock ${String(backbone.get("lock")).slice(0, 8)}.`;
  }
  if (pack.sections.has("adapter")) return "The pack changes the weights of the backbone, which this page does not.";
  if (template !== null && template.split("{}").length !== 2) return "The template has no place for vectors.";
  if (size.some((side) => side % unit)) return `The size is not a multiple of ${unit}.`;
  if (shape && shape[2] !== info.width) return `The vectors are not ${info.width} wide, as those of mini.`;
  return "";
}

interface Condition {
  hidden: Float32Array;
  tokens: number;
}

/** Makes the images of a pack. */
export class Rebuilder {
  private readonly conditions = new Map<string, Promise<Condition>>();
  private readonly prompts: Float32Array | undefined;
  private readonly recipe: JsonObject;
  private readonly shape: number[]; // of a latent
  private readonly coding: JsonObject | undefined;

  constructor(
    private readonly pack: Pack,
    private readonly parts: Parts,
  ) {
    this.recipe = recipe(pack);
    const [height, width] = this.recipe.get("size") as number[];
    const { channels, factor } = parts.info;
    this.shape = [channels, height / factor, width / factor];
    this.prompts = pack.sections.has("prompts") ? decodePrompts(pack) : undefined;
    this.coding = params(pack, "codes");
  }

  /** Return images as uint8 (3, H, W), made in one batch for each kind of image. */
  async images(pairs: Pair[]): Promise<Uint8Array[]> {
    const sources = pairs.map(([c, j]) => sourceOf(this.pack, c, j));
    const out = new Array<Uint8Array>(pairs.length);
    for (const isCoded of [true, false]) {
      const places = pairs.map((_, i) => i).filter((i) => (sources[i].code !== undefined) === isCoded);
      if (!places.length) continue;
      const made = await this.kind(places.map((i) => pairs[i]), places.map((i) => sources[i]), isCoded);
      places.forEach((place, i) => (out[place] = made[i]));
    }
    return out;
  }

  private async kind(pairs: Pair[], sources: Source[], isCoded: boolean): Promise<Uint8Array[]> {
    const latents = await this.latents(pairs, sources, isCoded);
    const pixels = await this.parts.networks.decode(latents, [pairs.length, ...this.shape]);
    if (!pixels.every(Number.isFinite)) throw new Error("the backbone made pixels that are not finite");
    const size = pixels.length / pairs.length;
    const made = pairs.map((_, i) => toBytes(pixels.subarray(i * size, (i + 1) * size)));
    return this.recipe.get("grey") === true ? made.map(toGrey) : made;
  }

  private async latents(pairs: Pair[], sources: Source[], isCoded: boolean): Promise<Float32Array> {
    const settings = isCoded ? (this.coding as JsonObject) : this.recipe;
    const sigmas = (settings.get("sigmas") as unknown as { value: number }[]).map((sigma) => sigma.value);
    const sampler = isCoded ? "ancestral" : (this.recipe.get("sampler") as string);
    const extra = isCoded ? this.coding : this.recipe.get("extra");
    const steps: Step[] = plan(sampler, sigmas, extra as JsonObject);
    const prompts = !isCoded || settings.get("prompts") === true;
    const guidance = real(settings.get("guidance"));
    const conditions = await Promise.all(pairs.map(([c], i) => (prompts ? this.condition(c, sources[i].mode) : this.none(false))));
    const none = prompts && guidance !== 1 ? await this.none(true) : undefined;
    const model = (x: Float32Array, sigma: number) => this.predict(x, sigma, conditions, none, guidance);
    return sample(steps, sigmas, model, this.draws(pairs, sources, isCoded));
  }

  /** Return the noise of a draw for a batch: fresh, or what codes choose. */
  private draws(pairs: Pair[], sources: Source[], isCoded: boolean): (step: number) => Float32Array {
    const size = this.shape.reduce((product, side) => product * side, 1);
    const choices: (Choice[] | undefined)[] = pairs.map(([c], i) =>
      isCoded ? choicesOf(rowOf(this.pack, "codes.bits", c), sources[i].code as number, this.coding as JsonObject) : undefined);
    return (step) => {
      const out = new Float32Array(pairs.length * size);
      sources.forEach(({ classWord, imageWord }, i) => {
        const row = out.subarray(i * size, (i + 1) * size);
        const choice = choices[i]?.[step];
        if (choice?.atoms.length) chosenNoise(this.parts.noise, step, choice, row);
        else this.parts.noise.fill(row, step, classWord, imageWord);
      });
      return out;
    };
  }

  /** Return the prediction of x0, guided where there is a condition of no class. */
  private async predict(
    x: Float32Array, sigma: number, conditions: Condition[], none: Condition | undefined, guidance: number,
  ): Promise<Float32Array> {
    if (!none) return this.denoise(x, sigma, conditions);
    const both = new Float32Array(2 * x.length);
    both.set(x);
    both.set(x, x.length);
    const out = await this.denoise(both, sigma, [...conditions.map(() => none), ...conditions]);
    const [without, within] = [out.subarray(0, x.length), out.subarray(x.length)];
    const [weight, area] = [Math.fround(guidance), this.shape[1] * this.shape[2]];
    const guided = (this.recipe.get("guided_channels") as number) || this.shape[0];
    return within.map((value, i) => {
      if (Math.floor(i / area) % this.shape[0] >= guided) return value;
      return Math.fround(Math.fround(value - without[i]) * weight) + without[i];
    });
  }

  private async denoise(x: Float32Array, sigma: number, conditions: Condition[]): Promise<Float32Array> {
    const { levels, networks } = this.parts;
    const size = conditions[0].hidden.length;
    const hidden = new Float32Array(conditions.length * size);
    conditions.forEach((condition, i) => hidden.set(condition.hidden, i * size));
    const shape = [conditions.length, ...this.shape];
    const out = await networks.denoise(levels.input(x, sigma), shape, levels.timestep(sigma), hidden, conditions[0].tokens);
    return levels.denoised(x, sigma, out);
  }

  /** Return the condition of a prompt. */
  private condition(c: number, mode: number): Promise<Condition> {
    const [modes, k, d] = params(this.pack, "prompts")?.get("shape") as number[];
    const at = (c * modes + mode) * k * d;
    return this.once(`${c} ${mode}`, () => this.ofVectors((this.prompts as Float32Array).subarray(at, at + k * d)));
  }

  /** Return the condition of no class, for guidance or for codes without prompts. */
  private none(guides: boolean): Promise<Condition> {
    return this.once(`none ${guides}`, () => {
      if (this.pack.sections.has("unconditional")) return this.ofVectors(decodePrompts(this.pack, "unconditional"));
      if (this.recipe.get("template") !== null) return this.ofText("", undefined);
      const shape = params(this.pack, "prompts")?.get("shape") as number[] | undefined;
      return this.ofVectors(new Float32Array((guides && shape ? shape[1] : 1) * this.parts.info.width));
    });
  }

  private once(key: string, make: () => Promise<Condition>): Promise<Condition> {
    if (!this.conditions.has(key)) this.conditions.set(key, make());
    return this.conditions.get(key) as Promise<Condition>;
  }

  private async ofVectors(vectors: Float32Array): Promise<Condition> {
    const template = this.recipe.get("template");
    if (typeof template === "string") return this.ofText(template, vectors);
    return { hidden: vectors.slice(), tokens: vectors.length / this.parts.info.width };
  }

  /** Return the encoded text, with vectors in the place of its {}. */
  private async ofText(text: string, vectors: Float32Array | undefined): Promise<Condition> {
    const { info, networks, tokenizer } = this.parts;
    const count = vectors ? vectors.length / info.width : 0;
    const [before, after] = (vectors ? text.split("{}") : [text, ""]).map((part) => tokenizer.ids(part));
    const at = 1 + before.length;
    const used = [tokenizer.start, ...before, ...new Array(count).fill(info.pad), ...after, tokenizer.end];
    if (used.length > info.positions) throw new Error(`${count} vectors and the template fill more than ${info.positions} positions`);
    const ids = [...used, ...new Array(info.positions - used.length).fill(info.pad)];
    const rows = new Float32Array(info.positions * info.width);
    const learned = new Float32Array(info.positions);
    if (vectors) rows.set(vectors, at * info.width);
    learned.fill(1, at, at + count);
    return { hidden: await networks.encode(ids, rows, learned), tokens: info.positions };
  }
}

/** Return pixels around [-1, 1] as bytes: clamp, scale, round half to even. */
export function toBytes(pixels: Float32Array): Uint8Array {
  return Uint8Array.from(pixels, (value) => {
    const x = Math.fround(Math.fround(Math.min(1, Math.max(-1, value)) * 127.5) + 127.5);
    const whole = Math.floor(x);
    const rest = x - whole;
    return whole + (rest > 0.5 || (rest === 0.5 && whole % 2) ? 1 : 0);
  });
}

/** Return an image (3, H, W) with its luma (ITU-R BT.601) in each channel. */
export function toGrey(image: Uint8Array): Uint8Array {
  const area = image.length / 3;
  const luma = image.subarray(0, area).map((red, i) =>
    (19595 * red + 38470 * image[area + i] + 7471 * image[2 * area + i] + 32768) >> 16);
  return Uint8Array.from({ length: image.length }, (_, i) => luma[i % area]);
}

/** Return an image (3, H, W) reduced by integer means of equal tiles. */
export function shrink(image: Uint8Array, size: number[], small: number[]): Uint8Array {
  const [height, width] = size;
  const [h, w] = small;
  const [tall, wide] = [height / h, width / w];
  const area = tall * wide;
  return Uint8Array.from({ length: 3 * h * w }, (_, i) => {
    const [channel, y, x] = [Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w];
    let sum = 0;
    for (let dy = 0; dy < tall; dy++) {
      const row = (channel * height + y * tall + dy) * width + x * wide;
      for (let dx = 0; dx < wide; dx++) sum += image[row + dx];
    }
    return Math.floor((2 * sum + area) / (2 * area));
  });
}

/** How far rebuilt probes are from the stored ones, in levels of 8 bits. */
export interface Gap {
  verdict: "exact" | "within tolerance" | "wrong backbone";
  rms: number;
  peak: number;
}

const [RMS, PEAK] = [2, 48];

/** Compare rebuilt probes with the stored ones. */
export function compare(stored: Uint8Array, rebuilt: Uint8Array): Gap {
  let [squares, peak] = [0, 0];
  stored.forEach((value, i) => {
    const gap = Math.abs(value - rebuilt[i]);
    squares += gap * gap;
    peak = Math.max(peak, gap);
  });
  const rms = Math.sqrt(squares / stored.length);
  const near = rms <= RMS && peak <= PEAK ? "within tolerance" : "wrong backbone";
  return { verdict: peak === 0 ? "exact" : near, rms, peak };
}
