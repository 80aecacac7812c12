/**
 * A third reader of .d3m files, written from spec/d3m-1.md. It checks every rule in the order of
 * the specification, refuses a file by the code of the first that is broken, and needs nothing but
 * WebCrypto.
 */

import { bitLength, bitsAt, combinations, halfToSingle, isClear, smallBitsAt } from "./bits.ts";
import { canonical, compareStrings, type Json, type JsonObject, parse, quote, Real } from "./json.ts";
import { need, Refused } from "./refused.ts";

export { Refused };

type Dtype = "U8" | "I8" | "U32" | "F16";
export type Values = Uint8Array | Int8Array | Uint32Array | Float32Array;
type Shapes = Record<string, [Dtype, (number | bigint)[]]>;

/** A tensor of a section: where it lies in the shared bytes, or in the row of each class. */
export interface Tensor {
  name: string;
  dtype: Dtype;
  shared: boolean;
  start: number;
  stop: number;
}

export interface Section {
  name: string;
  codec: string;
  params: JsonObject;
  hash: string | undefined;
  images: number; // n, or for picks the images without a code
  tensors: Tensor[];
  shared: [number, number];
  row: number; // bytes of each class
}

/** What a valid file holds. */
export interface Pack {
  root: string;
  bytes: number;
  written: JsonObject; // the manifest as it is in the file
  manifest: JsonObject; // with its defaults
  names: string[];
  imagesPerClass: number;
  sections: Map<string, Section>;
  /** Values of a tensor by "section.tensor", class after class; nothing where there is none. */
  arrays: Map<string, Values>;
}

const CODECS: Record<string, string[]> = {
  classes: ["utf8"],
  leaves: ["sha256-128"],
  ids: ["u32"],
  prompts: ["f16", "i8", "i4", "pq"],
  unconditional: ["f16", "i8", "i4", "pq"],
  codes: ["noise"],
  picks: ["lanes", "sets"],
  labels: ["topk", "dense"],
  weights: ["log"],
  adapter: ["f16", "i8"],
  probes: ["u8"],
};
const ORDER = Object.keys(CODECS);
const SHARED = new Set(["classes", "leaves", "unconditional", "adapter", "probes"]);
const SIZES: Record<Dtype, number> = { U8: 1, I8: 1, U32: 4, F16: 2 };

const MAX_HEADER = 25_000_000n;
const MAX_MARKS = 1_000_000;
const MARKS = new Set([..."[{,"].map((mark) => mark.charCodeAt(0)));
const MAX_DATA = 2n ** 40n;
const real = (value: number) => new Real(value);
const DEFAULTS = object({ optional: object({}), provenance: object({}), requires: [], seed: "0".repeat(16) });
const RECIPE_DEFAULTS = object({
  dtype: "float32",
  extra: object({}),
  grey: false,
  group: 16,
  guidance: real(1),
  guided_channels: 0,
  noise: "philox-normal16",
  sampler: "dpmpp-2m",
  template: "a photo of a {}",
});
const BACKBONE_DEFAULTS = object({ kind: "stable-diffusion", licence: "unknown", repo: "" });
const FIELDS = "classes d3m images_per_class optional provenance recipe requires root sections seed";
const RECIPE =
  "backbone dtype extra grey group guidance guided_channels noise sampler sigmas size template";
const CODE_FIELDS = ["atoms", "codes", "eta", "guidance", "prompts", "sigmas"];
const CODE_DEFAULTS = object({ bits: 8, eta: real(1), guidance: real(1), prompts: true });

const FEATURE = full("[a-z][a-z0-9-]{0,31}");
const HEX16 = full("[0-9a-f]{16}");
const HEX32 = full("[0-9a-f]{32}");
const HEX40 = full("[0-9a-f]{40}");
const HEX64 = full("[0-9a-f]{64}");
const KIND = full("[a-z0-9][a-z0-9._\\-]{0,63}");
const LINE = full("[^\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ufeff]{0,1024}");
const PARAMETER = full("[A-Za-z0-9_][A-Za-z0-9._\\-]{0,254}");
const PART = "[A-Za-z0-9][A-Za-z0-9._\\-]{0,95}";
const REPO = full(`|${PART}(?:/${PART})?`);
const SAMPLER = full("ancestral|ddim|dpmpp-2m|euler|lcm|table");
const DTYPE = full("float32|bfloat16|float16");
const HIDDEN = /[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/;

/** Return what a file holds, after every rule of the format was checked. */
export async function read(data: Uint8Array): Promise<Pack> {
  need(data.length >= 8, "E_TRUNCATED", "the file has fewer than 8 bytes");
  const length = new DataView(data.buffer, data.byteOffset).getBigUint64(0, true);
  need(length <= MAX_HEADER, "E_LIMIT", `the header has more than ${MAX_HEADER} bytes`);
  const headerBytes = 8 + Number(length);
  need(headerBytes <= data.length, "E_TRUNCATED", "the file ends before its header does");
  const raw = data.subarray(8, headerBytes);
  const text = headerText(raw);
  const written = parse(text);
  const manifest = await checkManifest(written, text);
  const classes = manifest.get("classes") as number;
  const images = manifest.get("images_per_class") as number;
  const optional = manifest.get("optional") as JsonObject;
  const sections = checkSections(manifest.get("sections") as Json, optional);
  const [shared, row] = place(sections, classes, images);
  const expected = headerOf(text, shared, classes, row);
  need(sameBytes(data.subarray(0, headerBytes), expected), "E_CANON", "the header is not the one that the manifest determines");
  const body = data.subarray(headerBytes);
  const over = body.length - shared - classes * row;
  need(over >= 0, "E_TRUNCATED", `${-over} bytes of data are missing`);
  need(over === 0, "E_TRAILING", `${over} bytes after the data`);
  await checkHashes(sections, body, shared, classes, row);
  const names = classNames(body.subarray(...(sections.get("classes") as Section).shared), classes);
  const arrays = new Map<string, Values>();
  for (const section of sections.values()) {
    for (const tensor of section.tensors) {
      arrays.set(`${section.name}.${tensor.name}`, valuesOf(tensor, body, shared, classes, row));
    }
  }
  checkValues(sections, arrays, classes, images);
  const root = manifest.get("root") as string;
  return {
    root, bytes: data.length, written: written as JsonObject, manifest, names,
    imagesPerClass: images, sections, arrays,
  };
}

/** Return the text of the manifest in a header. */
function headerText(raw: Uint8Array): string {
  const isAscii = raw.every((byte) => byte < 128);
  need(raw[0] === 0x7b && isAscii, "E_HEADER", "the header does not begin with { or is not ASCII");
  let marks = 0;
  for (const byte of raw) marks += MARKS.has(byte) ? 1 : 0;
  need(marks <= MAX_MARKS, "E_LIMIT", `the header has ${marks} commas, [ and {`);
  const header = parse(new TextDecoder().decode(raw)) as JsonObject;
  const meta = header.get("__metadata__");
  need(hasFields(meta, "d3m"), "E_HEADER", "__metadata__ is not an object with one string d3m");
  const text = (meta as JsonObject).get("d3m");
  need(typeof text === "string", "E_HEADER", "d3m is not a string");
  need(/^[\x00-\x7f]*$/.test(text), "E_JSON", "the manifest is not ASCII");
  return text;
}

async function checkManifest(m: Json, text: string): Promise<JsonObject> {
  need(m instanceof Map, "E_MANIFEST", "the manifest is not an object");
  const version = m.get("d3m");
  const requires = m.has("requires") ? m.get("requires") : [];
  need(isArray(version, 2, 2) && version.every((x) => isWhole(x, 0, 2 ** 31 - 1)), "E_MANIFEST", "d3m is not [major, minor]");
  need(version[0] === 1, "E_VERSION", `version ${canonical(version)} is not supported`);
  need(Array.isArray(requires) && requires.every((x) => typeof x === "string"), "E_MANIFEST", "requires is not an array of names");
  need(requires.length === 0, "E_FEATURE", `unknown feature ${canonical(requires)}`);
  need(canonical(m) === text, "E_CANON", "the manifest is not in canonical form");
  const out = withDefaults(m);
  const seed = out.get("seed");
  const optional = out.get("optional");
  need(hasFields(out, FIELDS) && isLike(HEX16, seed), "E_MANIFEST", "a field is missing or unknown, or the seed is malformed");
  const areObjects = optional instanceof Map && out.get("provenance") instanceof Map;
  need(areObjects && [...optional.keys()].every((x) => FEATURE.test(x)), "E_MANIFEST", "optional or provenance");
  for (const [name, most] of [["classes", 2 ** 20], ["images_per_class", 2 ** 24]] as const) {
    const count = m.get(name);
    need(typeof count === "number", "E_MANIFEST", `${name} is not an integer`);
    need(count >= 1 && count <= most, "E_LIMIT", `${name} is not from 1 to ${most}`);
  }
  const rest = new Map([...m].filter(([name]) => name !== "root"));
  const root = await digest(new TextEncoder().encode(canonical(rest)));
  need(m.get("root") === root, "E_ROOT", `the manifest has the hash ${root}`);
  need(isRecipe(out.get("recipe") as Json), "E_RECIPE", "the recipe breaks a rule of section 5");
  const images = (m.get("classes") as number) * (m.get("images_per_class") as number);
  need(images <= 2 ** 32, "E_LIMIT", `${images} images`);
  return out;
}

function withDefaults(m: JsonObject): JsonObject {
  const out = filled(m, DEFAULTS);
  const recipe = m.get("recipe");
  if (recipe instanceof Map) {
    const full = filled(recipe, RECIPE_DEFAULTS);
    out.set("recipe", full);
    const backbone = recipe.get("backbone");
    if (backbone instanceof Map) {
      const lock = backbone.get("lock");
      const commit = typeof lock === "string" ? [["revision", lock.slice(0, 40)] as const] : [];
      full.set("backbone", filled(backbone, new Map([...BACKBONE_DEFAULTS, ...commit])));
    }
  }
  return out;
}

/** Return an object with its defaults, none of which may be written. */
function filled(value: JsonObject, defaults: JsonObject): JsonObject {
  for (const [name, usual] of defaults) {
    const given = value.get(name);
    const isDefault = given !== undefined && canonical(given) === canonical(usual);
    need(!isDefault, "E_CANON", `${name} has its default and must be left out`);
  }
  return new Map([...defaults, ...value]);
}

function isRecipe(r: Json): boolean {
  if (!hasFields(r, RECIPE)) return false;
  const get = (name: string) => (r as JsonObject).get(name) as Json;
  const [backbone, extra, sampler, sigmas] = ["backbone", "extra", "sampler", "sigmas"].map(get);
  const size = get("size");
  return (
    isBackbone(backbone) &&
    isArray(size, 2, 2) && size.every((side) => isWhole(side, 1, 8192)) &&
    isLike(SAMPLER, sampler) && extra instanceof Map &&
    isLike(DTYPE, get("dtype")) && get("noise") === "philox-normal16" &&
    areSigmas(sigmas, sampler === "ancestral" || sampler === "lcm" ? 257 : 1001) &&
    (sampler === "ancestral" ? isReal(extra.get("eta"), 0, 1e3) : !extra.has("eta")) &&
    (sampler === "table" ? isTable(extra.get("table"), sigmas.length - 1) : !extra.has("table")) &&
    isReal(get("guidance"), -1e3, 1e3) &&
    typeof get("grey") === "boolean" &&
    isWhole(get("guided_channels"), 0, 1024) && isWhole(get("group"), 1, 1024) &&
    isTemplate(get("template"))
  );
}

function isBackbone(b: Json): boolean {
  if (!hasFields(b, "bytes kind licence lock repo revision")) return false;
  const get = (name: string) => (b as JsonObject).get(name);
  return (
    isLike(KIND, get("kind")) && isLike(REPO, get("repo")) && isLike(HEX40, get("revision")) &&
    isLike(LINE, get("licence")) && isLike(HEX64, get("lock")) && isWhole(get("bytes"), 0, 2 ** 48)
  );
}

function isTemplate(value: Json): boolean {
  return value === null || (isLike(LINE, value) && (value as string).split("{}").length <= 2);
}

function areSigmas(sigmas: Json | undefined, most: number): sigmas is Real[] {
  if (!isArray(sigmas, 2, most) || !sigmas.every((x) => x instanceof Real)) return false;
  const levels = (sigmas as Real[]).map((x) => x.value);
  const steps = levels.slice(1).every((low, i) => levels[i] >= low * (1 + 1e-6));
  return steps && Object.is(levels.at(-1), 0) && levels[0] <= 1e6 && (levels.at(-2) as number) >= 1e-6;
}

function isTable(rows: Json | undefined, steps: number): boolean {
  const isNumber = (x: Json) => typeof x === "number" || x instanceof Real;
  return isArray(rows, steps, steps) && rows.every((row, i) =>
    isArray(row, 2, 2) && isNumber(row[0]) && isArray(row[1], 1, Math.min(i + 1, 4)) && row[1].every(isNumber));
}

function checkSections(entries: Json, optional: JsonObject): Map<string, Section> {
  need(isArray(entries, 0, 64), "E_SECTION", "sections is not an array of at most 64 entries");
  const sections = new Map<string, Section>();
  let before: [number, string] = [-1, ""];
  let ordered = true;
  for (const entry of entries) {
    need(isArray(entry, 3, 4) && isLike(FEATURE, entry[0]), "E_SECTION", "an entry is malformed");
    const [name, codec, params, hash] = entry as [string, Json, Json, Json | undefined];
    need(ORDER.includes(name) || optional.has(name), "E_SECTION", `unknown section ${name}`);
    const isEntry = typeof codec === "string" && params instanceof Map && (hash === undefined || isLike(HEX32, hash));
    need(isEntry, "E_SECTION", `the entry of ${name} is malformed`);
    const rank = ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length;
    ordered &&= rank > before[0] || (rank === before[0] && rank === ORDER.length && compareStrings(name, before[1]) > 0);
    before = [rank, name];
    sections.set(name, { name, codec, params, hash: hash as string | undefined, images: 0, tensors: [], shared: [0, 0], row: 0 });
  }
  need(ordered && sections.has("classes") && sections.has("leaves"), "E_SECTION", "sections are missing, repeated or out of order");
  return sections;
}

/** Find where every tensor lies; return the bytes of `shared` and of a row. */
function place(sections: Map<string, Section>, classes: number, images: number): [number, number] {
  let [shared, row] = [0n, 0n];
  let seeded = images; // images without a code
  let vectors: Json[] | undefined;
  for (const [name, section] of sections) {
    if (name === "codes") section.params = filled(section.params, codeDefaults(section.params));
    const { codec, params } = section;
    need(!(name in CODECS) || CODECS[name].includes(codec), "E_CODEC", `unknown codec ${quote(codec)} of ${name}`);
    section.images = name === "picks" ? seeded : images;
    const shapes = shapesOf(section, classes);
    if (name === "prompts" || name === "unconditional") {
      const shape = params.get("shape") as Json[];
      vectors ??= shape.slice(1);
      const isOne = canonical(shape) === canonical([1, ...vectors]);
      need(name === "prompts" || isOne, "E_CODEC", "the shape of unconditional is not that of one prompt");
    }
    if (name === "codes") seeded -= params.get("images") as number;
    const [start, rowStart] = [shared, row];
    for (const [tensor, [dtype, shape]] of Object.entries(shapes)) {
      const isShared = SHARED.has(name) || tensor === "codebook" || tensor === "shared";
      const size = shape.reduce<bigint>((product, side) => product * BigInt(side), BigInt(SIZES[dtype]));
      const at = isShared ? shared : row;
      const stop = at + (isShared ? size : size / BigInt(classes));
      if (isShared) shared = stop;
      else row = stop;
      section.tensors.push({ name: tensor, dtype, shared: isShared, start: Number(at), stop: Number(stop) });
    }
    section.shared = [Number(start), Number(shared)];
    section.row = Number(row - rowStart);
    need((section.hash !== undefined) === start < shared, "E_SECTION", `the hash of ${name} is there without shared bytes, or missing`);
    need(shared + BigInt(classes) * row <= MAX_DATA, "E_LIMIT", "more than 2^40 bytes of data");
  }
  const used = seeded > 0 || sections.get("codes")?.params.get("prompts") === true;
  need(sections.has("prompts") === used, "E_SECTION", used ? "prompts are missing" : "no image uses the prompts");
  return [Number(shared), Number(row)];
}

/** Check the parameters of a section; return dtypes and shapes of its tensors. */
function shapesOf(section: Section, classes: number): Shapes {
  switch (section.name) {
    case "prompts": return promptShapes(section, classes);
    case "unconditional": return promptShapes(section, 1);
    case "codes": return codeShapes(section, classes);
    case "labels": return labelShapes(section, classes);
    case "adapter": return adapterShapes(section);
    case "classes": {
      const { bytes } = parameters(section.params, { bytes: [1, 2 ** 40] });
      return { text: ["U8", [bytes]] };
    }
    case "leaves":
      parameters(section.params, {});
      return { hash: ["U8", [classes, 16]] };
    case "ids":
      parameters(section.params, {});
      return { ids: ["U32", [classes]] };
    case "picks": return pickShapes(section, classes);
    case "weights":
      parameters(section.params, {});
      return { codes: ["U8", [classes, section.images]] };
    case "probes": {
      parameters(section.params, { shape: undefined });
      const [count, ...sides] = promptShape(section.params, [4096, 8192, 8192]);
      return { images: ["U8", [count, 3, ...sides]], labels: ["U32", [count]], indices: ["U32", [count]] };
    }
    default: return opaqueShapes(section.params, classes);
  }
}

function promptShapes({ codec, params }: Section, count: number): Shapes {
  const more: Record<string, Ranges> = {
    i4: { group: [1, 65536] },
    pq: { dim: [1, 65536], entries: [1, 256] },
  };
  const { group, dim, entries } = parameters(params, { shape: undefined, ...more[codec] });
  const [modes, vectors, width] = promptShape(params, [4096, 1024, 65536]);
  const front = [count, modes, vectors];
  if (codec === "f16") return { values: ["F16", [...front, width]] };
  if (codec === "i8") return { codes: ["I8", [...front, width]], scales: ["F16", front] };
  if (codec === "i4") {
    const scales: [Dtype, number[]] = ["F16", [...front, Math.ceil(width / group)]];
    return { codes: ["U8", [...front, Math.ceil(width / 2)]], scales };
  }
  const codes: [Dtype, number[]] = ["U8", [...front, Math.ceil(width / dim)]];
  return { codebook: ["F16", [entries, dim]], codes, scales: ["F16", front] };
}

/** Return the parameters of codes that are left out where they have these values. */
function codeDefaults(params: JsonObject): JsonObject {
  const sigmas = params.get("sigmas");
  const atoms = Array.isArray(sigmas) ? sigmas.slice(1).fill(1) : [];
  return new Map<string, Json>([...CODE_DEFAULTS, ["atoms", atoms], ["images", params.get("codes") ?? null]]);
}

function codeShapes({ params, images }: Section, classes: number): Shapes {
  const rest = Object.fromEntries(CODE_FIELDS.map((name) => [name, undefined]));
  const limits = parameters(params, { bits: [1, 16], images: [1, images], ...rest });
  const [atoms, eta, guidance] = ["atoms", "eta", "guidance"].map((name) => params.get(name));
  const [codes, prompts, sigmas] = ["codes", "prompts", "sigmas"].map((name) => params.get(name));
  const isValid =
    isWhole(codes, 1, limits.images) && areSigmas(sigmas, 257) && isReal(eta, 0, 1e3) &&
    isReal(guidance, -1e3, 1e3) && typeof prompts === "boolean" && (prompts || guidance.value === 1) &&
    isArray(atoms, sigmas.length - 1, sigmas.length - 1) &&
    atoms.every((m, i) => isWhole(m, 0, i && !eta.value ? 0 : Math.min(1024, 2 ** limits.bits))) &&
    atoms.some((m) => m !== 0);
  need(isValid, "E_CODEC", "a parameter of codes is not one that they take");
  const bits = codeWidths(params).reduce((sum, width) => sum + width, 0);
  return { bits: ["U8", [classes, (BigInt(codes as number) * BigInt(bits) + 7n) / 8n]] };
}

/** Return the bits of a code at each of its levels. */
export function codeWidths(params: JsonObject): number[] {
  const entries = 2 ** (params.get("bits") as number);
  const known = new Map<number, number>();
  return (params.get("atoms") as number[]).map((count) => {
    if (!known.has(count)) known.set(count, bitLength(combinations(entries, count) - 1n) + count);
    return known.get(count) as number;
  });
}

function pickShapes({ codec, params, images }: Section, classes: number): Shapes {
  if (codec === "sets") {
    const { bits, stride } = parameters(params, { bits: [1, 24], stride: [images, 2 ** 31] });
    need(stride * 2 ** bits <= 2 ** 32 && images > 0, "E_CODEC", "stride, or no image is seeded");
    return { codes: ["U8", [classes, Math.ceil(bits / 8)]] };
  }
  const { bits, lanes } = parameters(params, { bits: [1, 16], lanes: [1, 2 ** 31] });
  need(lanes * 2 ** bits <= 2 ** 32 && images > 0, "E_CODEC", "lanes, or no image is seeded");
  return { codes: ["U8", [classes, Math.ceil((images * bits) / 8)]] };
}

function labelShapes({ codec, params, images }: Section, classes: number): Shapes {
  if (codec === "dense") {
    parameters(params, {});
    return { probs: ["F16", [classes, images, classes]] };
  }
  const { k, bits } = parameters(params, { k: [1, classes], bits: [2, 12], octaves: [1, 64] });
  const record = BigInt(k * (indexWidth(classes) + bits));
  return { bits: ["U8", [classes, (BigInt(images) * record + 7n) / 8n]] };
}

const indexWidth = (classes: number) => Math.max(1, bitLength(BigInt(classes - 1)));

function adapterShapes({ codec, params }: Section): Shapes {
  parameters(params, { table: undefined });
  const table = params.get("table") as Json;
  need(isArray(table, 1, 16384), "E_ADAPTER", "the table is not an array of 1 to 16384 entries");
  let [total, rows] = [0n, 0n];
  for (const entry of table) {
    const isEntry = isArray(entry, 2, 2) && isLike(PARAMETER, entry[0]) && isArray(entry[1], 1, 6);
    need(isEntry, "E_ADAPTER", "an entry of the table is malformed");
    const shape = (entry as Json[])[1] as number[];
    need(shape.every((side) => isWhole(side, 1, 2 ** 31 - 1)), "E_ADAPTER", "a shape");
    total += shape.reduce((product, side) => product * BigInt(side), 1n);
    rows += BigInt(shape.length > 1 ? shape[0] : 1);
  }
  const names = table.map((entry) => (entry as string[])[0]);
  const ordered = names.every((name, i) => !i || compareStrings(names[i - 1], name) < 0);
  need(ordered, "E_ADAPTER", "the table is not sorted by name, or a name is repeated");
  return codec === "f16" ? { values: ["F16", [total]] } : { codes: ["I8", [total]], scales: ["F16", [rows]] };
}

/** Return the bytes of a section of a newer minor version. */
function opaqueShapes(params: JsonObject, classes: number): Shapes {
  const [row, shared] = [params.get("row"), params.get("shared")];
  const given = [row, shared].filter((size) => size !== undefined);
  need(given.length > 0 && given.every((size) => isWhole(size, 1, 2 ** 40)), "E_CODEC", "row or shared");
  return {
    ...(row === undefined ? {} : { rows: ["U8", [classes, row as number]] as [Dtype, number[]] }),
    ...(shared === undefined ? {} : { shared: ["U8", [shared as number]] as [Dtype, number[]] }),
  };
}

type Ranges = Record<string, [number, number] | undefined>;

/** Check that there are exactly these parameters, and that those with a range lie within it. */
function parameters(params: JsonObject, ranges: Ranges): Record<string, number> {
  need(hasFields(params, Object.keys(ranges).sort().join(" ")), "E_CODEC", "a parameter is missing or unknown");
  for (const [name, range] of Object.entries(ranges)) {
    const fits = range === undefined || isWhole(params.get(name), ...range);
    need(fits, "E_CODEC", `parameter ${name} is not from ${range?.[0]} to ${range?.[1]}`);
  }
  return Object.fromEntries([...params].filter(([name]) => ranges[name])) as Record<string, number>;
}

function promptShape(params: JsonObject, most: number[]): number[] {
  const shape = params.get("shape");
  const fits = isArray(shape, 3, 3) && shape.every((side, i) => isWhole(side, 1, most[i]));
  need(fits, "E_CODEC", `shape is not 1 to ${most.join(", ")}`);
  return shape as number[];
}

/** Return the only header for a manifest. */
function headerOf(text: string, shared: number, classes: number, row: number): Uint8Array {
  const entry = (name: string, shape: number[], from: number, to: number) =>
    `"${name}":{"dtype":"U8","shape":[${shape.join(",")}],"data_offsets":[${from},${to}]}`;
  const tensors = [
    entry("shared", [shared], 0, shared),
    entry("rows", [classes, row], shared, shared + classes * row),
  ];
  const header = `{"__metadata__":{"d3m":${quote(text)}},${tensors.join(",")}}`;
  const size = Math.ceil((8 + header.length) / 8) * 8;
  const out = new Uint8Array(size).fill(0x20);
  new DataView(out.buffer).setBigUint64(0, BigInt(size - 8), true);
  out.set(new TextEncoder().encode(header), 8);
  return out;
}

async function checkHashes(
  sections: Map<string, Section>, body: Uint8Array, shared: number, classes: number, row: number,
): Promise<void> {
  for (const section of sections.values()) {
    const hash = section.hash && (await digest(body.subarray(...section.shared))).slice(0, 32);
    need(hash === section.hash, "E_HASH", `the bytes of ${section.name} have the hash ${hash}`);
  }
  const leaves = hex(body.subarray(...(sections.get("leaves") as Section).shared));
  for (let c = 0; c < classes; c++) {
    const hash = await digest(body.subarray(shared + c * row, shared + (c + 1) * row));
    need(hash.startsWith(leaves.slice(32 * c, 32 * c + 32)), "E_LEAF", `the row of class ${c} has been changed`);
  }
}

function classNames(bytes: Uint8Array, count: number): string[] {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new Refused("E_NAME", "class names are not UTF-8");
  }
  const names = text.split("\n");
  need(names.length === count, "E_NAME", `${names.length} names for ${count} classes`);
  need(new Set(names).size === count, "E_NAME", "a class name is repeated");
  for (const name of names) {
    const size = new TextEncoder().encode(name).length;
    need(size >= 1 && size <= 1024 && !HIDDEN.test(name), "E_NAME", "a name is empty, too long, or holds control characters");
  }
  return names;
}

/** Return the values of a tensor of all classes; half precision becomes single. */
function valuesOf(tensor: Tensor, body: Uint8Array, shared: number, classes: number, row: number): Values {
  const size = tensor.stop - tensor.start;
  const count = tensor.shared ? 1 : classes;
  const bytes = new Uint8Array(size * count); // a copy, which is aligned
  for (let c = 0; c < count; c++) {
    const from = tensor.start + (tensor.shared ? 0 : shared + c * row);
    bytes.set(body.subarray(from, from + size), c * size);
  }
  const view = new DataView(bytes.buffer);
  if (tensor.dtype === "U8") return bytes;
  if (tensor.dtype === "I8") return new Int8Array(bytes.buffer);
  if (tensor.dtype === "U32") {
    return Uint32Array.from({ length: bytes.length / 4 }, (_, i) => view.getUint32(4 * i, true));
  }
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => halfToSingle(view.getUint16(2 * i, true)));
}

function checkValues(sections: Map<string, Section>, arrays: Map<string, Values>, classes: number, images: number): void {
  const ids = arrays.get("ids.ids");
  const isUsual = ids?.every((id, c) => id === c);
  need(!ids || (new Set(ids).size === classes && !isUsual), "E_IDS", "ids are repeated, or are 0, 1, 2, ...");
  for (const name of ["prompts", "unconditional"]) {
    const section = sections.get(name);
    if (section) checkPrompts(section, arrays);
  }
  const rowsOf = (name: string) => rows(arrays.get(name) as Uint8Array | undefined, classes);
  const params = (name: string) => (sections.get(name) as Section).params;
  for (const row of rowsOf("codes.bits")) checkCodes(row, params("codes"));
  for (const row of rowsOf("picks.codes")) checkPicks(row, sections.get("picks") as Section);
  checkDense(arrays.get("labels.probs") as Float32Array | undefined, classes);
  for (const row of rowsOf("labels.bits")) checkTopK(row, classes, images, params("labels"));
  const says = arrays.get("weights.codes")?.some((code: number) => code !== 128);
  need(says !== false, "E_WEIGHTS", "all weights are 1 and must be left out");
  if (sections.has("adapter")) checkFinite(sections.get("adapter") as Section, arrays, "E_ADAPTER");
  checkProbes(arrays, classes, images);
}

function checkFinite(section: Section, arrays: Map<string, Values>, code: string): void {
  for (const { name, dtype } of section.tensors) {
    const values = arrays.get(`${section.name}.${name}`) as Values;
    const isFinite = dtype !== "F16" || values.every((x: number) => Number.isFinite(x));
    need(isFinite, code, `${section.name}.${name} has values that are not finite`);
    need(dtype !== "I8" || !values.includes(-128), code, `${section.name}.${name} has the code -128`);
  }
}

function checkPrompts(section: Section, arrays: Map<string, Values>): void {
  checkFinite(section, arrays, "E_PROMPT");
  const codes = arrays.get(`${section.name}.codes`) ?? new Uint8Array();
  const width = (section.params.get("shape") as number[])[2];
  if (section.codec === "i4" && width % 2) {
    const bytes = (width + 1) / 2;
    const isClear = codes.every((x: number, i: number) => i % bytes !== bytes - 1 || x < 16);
    need(isClear, "E_PROMPT", `${section.name}: a nibble beyond the vector is not 0`);
  }
  if (section.codec === "pq") {
    const entries = section.params.get("entries") as number;
    need(codes.every((x: number) => x < entries), "E_PROMPT", `${section.name}: a code beyond the codebook`);
  }
}

function checkCodes(row: Uint8Array, params: JsonObject): void {
  const [atoms, widths] = [params.get("atoms") as number[], codeWidths(params)];
  const entries = 2 ** (params.get("bits") as number);
  const sets = new Map(atoms.map((count) => [count, combinations(entries, count)]));
  let at = 0;
  for (let code = 0; code < (params.get("codes") as number); code++) {
    atoms.forEach((count, level) => {
      const rank = bitsAt(row, at, widths[level]) >> BigInt(count);
      need(rank < (sets.get(count) as bigint), "E_CODES", "the atoms of a code do not exist");
      at += widths[level];
    });
  }
  need(isClear(row, at), "E_CODES", "a bit has no meaning");
}

function checkPicks(row: Uint8Array, { codec, params, images }: Section): void {
  if (codec === "sets") return need(isClear(row, params.get("bits") as number), "E_PICKS", "a bit has no meaning");
  const [bits, lanes] = [params.get("bits") as number, params.get("lanes") as number];
  const seen = new Set<number>();
  for (let i = 0; i < images; i++) seen.add((i % lanes) + lanes * smallBitsAt(row, i * bits, bits));
  need(isClear(row, images * bits), "E_PICKS", "a bit has no meaning");
  need(seen.size === images, "E_PICKS", "a candidate is picked twice");
}

function checkDense(probs: Float32Array | undefined, classes: number): void {
  for (let at = 0; probs && at < probs.length; at += classes) {
    const row = probs.subarray(at, at + classes);
    const isMass = row.every((x) => x < Infinity && (x > 0 || Object.is(x, 0)));
    need(isMass, "E_LABEL", "a probability is not finite, or has a sign");
    need(Math.abs(row.reduce((sum, x) => sum + x, 0) - 1) <= 2 ** -8, "E_LABEL", "a label does not sum to 1");
  }
}

function checkTopK(row: Uint8Array, classes: number, images: number, params: JsonObject): void {
  for (const { indices, codes } of topKRecords(row, classes, images, params)) {
    const ranks = [0, ...codes.slice(0, -1)];
    const tail = codes[codes.length - 1];
    const ordered = indices.every((index, i) =>
      !i || ranks[i - 1] < ranks[i] || (ranks[i - 1] === ranks[i] && indices[i - 1] < index));
    const isSet = new Set(indices).size === indices.length && Math.max(...indices) < classes;
    need(ordered && isSet, "E_LABEL", "the classes of a label");
    const none = 2 ** (params.get("bits") as number) - 1;
    need(indices.length === classes ? tail === none : tail > 0, "E_LABEL", "the tail of a label");
  }
  const record = (params.get("k") as number) * (indexWidth(classes) + (params.get("bits") as number));
  need(isClear(row, images * record), "E_LABEL", "a bit has no meaning");
}

/** Return class indices and codes of the labels of a class. */
export function* topKRecords(
  row: Uint8Array, classes: number, images: number, params: JsonObject,
): Generator<{ indices: number[]; codes: number[] }> {
  const [k, bits] = [params.get("k") as number, params.get("bits") as number];
  const width = indexWidth(classes);
  let at = 0;
  const take = (size: number) => smallBitsAt(row, (at += size) - size, size);
  for (let i = 0; i < images; i++) {
    const indices = Array.from({ length: k }, () => take(width));
    yield { indices, codes: Array.from({ length: k }, () => take(bits)) };
  }
}

function checkProbes(arrays: Map<string, Values>, classes: number, images: number): void {
  const [labels, indices] = [arrays.get("probes.labels"), arrays.get("probes.indices")];
  if (!labels || !indices) return;
  const isInside = labels.every((c: number) => c < classes) && indices.every((i: number) => i < images);
  need(isInside, "E_PROBE", "a probe is of an image that the pack lacks");
  const pairs = new Set([...labels].map((c, at) => c * images + indices[at]));
  need(pairs.size === labels.length, "E_PROBE", "a probe is repeated");
}

export async function digest(bytes: Uint8Array): Promise<string> {
  return hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes as BufferSource)));
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** Return the rows of a tensor that is divided by classes. */
export function* rows<T extends Values>(values: T | undefined, classes: number): Generator<T> {
  const size = values ? values.length / classes : 0;
  for (let c = 0; values && c < classes; c++) yield values.subarray(c * size, (c + 1) * size) as T;
}

function object(fields: Record<string, Json>): JsonObject {
  return new Map(Object.entries(fields));
}

function full(pattern: string): RegExp {
  return new RegExp(`^(?:${pattern})$`, "u");
}

function isLike(pattern: RegExp, value: Json | undefined): boolean {
  return typeof value === "string" && pattern.test(value);
}

function isArray(value: Json | undefined, low: number, high: number): value is Json[] {
  return Array.isArray(value) && value.length >= low && value.length <= high;
}

function isWhole(value: Json | undefined, low: number, high: number): value is number {
  return typeof value === "number" && value >= low && value <= high;
}

function isReal(value: Json | undefined, low: number, high: number): value is Real {
  const x = value instanceof Real ? value.value : NaN;
  return low <= x && x <= high && !Object.is(x, -0);
}

function hasFields(value: Json | undefined, names: string): boolean {
  return value instanceof Map && [...value.keys()].sort(compareStrings).join(" ") === names;
}
