/** The parts of the page that a verified pack fills without its backbone. */

import { ledgerOf, params, real, recipe, softLabels } from "./content.ts";
import { el, facts, grouped, size, table } from "./dom.ts";
import { canonical, type JsonObject, Real } from "./json.ts";
import type { Pack } from "./reader.ts";

const SHOWN_LABELS = 8;

/** Return what the pack is, in a few facts. */
export function summary(pack: Pack): HTMLElement {
  const backbone = recipe(pack).get("backbone") as JsonObject;
  const [height, width] = recipe(pack).get("size") as number[];
  const images = pack.names.length * pack.imagesPerClass;
  return facts([
    ["Classes", grouped(pack.names.length)],
    ["Images", `${grouped(images)}, ${grouped(pack.imagesPerClass)} a class, ${width} × ${height} pixels`],
    ["File", `${grouped(pack.bytes)} bytes, ${(pack.bytes / images).toFixed(1)} an image`],
    ["Backbone", `${String(backbone.get("repo")) || String(backbone.get("kind"))}, ${size(backbone.get("bytes") as number)} beside the pack`],
    ["Licence of the backbone", String(backbone.get("licence"))],
    ["Root", pack.root],
  ]);
}

/** Return the recipe, as facts. */
export function recipeFacts(pack: Pack): HTMLElement {
  const r = recipe(pack);
  const sigmas = (r.get("sigmas") as Real[]).map((sigma) => sigma.value);
  const template = r.get("template");
  const prompts = params(pack, "prompts")?.get("shape") as number[] | undefined;
  const coding = params(pack, "codes");
  const plural = (count: number, what: string) => `${grouped(count)} ${what}${count === 1 ? "" : "s"}`;
  const vectors = prompts && `${pack.sections.get("prompts")?.codec}: ${plural(prompts[0], "mode")} of ${plural(prompts[1], "vector")} of ${plural(prompts[2], "value")}`;
  const picks = params(pack, "picks");
  return facts([
    ["Sampler", `${r.get("sampler")}, ${plural(sigmas.length - 1, "step")} from sigma ${Number(sigmas[0].toPrecision(4))}`],
    ["Guidance", String(real(r.get("guidance")))],
    ["Template", template === null ? "none: vectors are outputs of the text encoder" : `“${template}”`],
    ["Prompts", vectors ?? "none"],
    ["Codes", coding ? `${grouped(coding.get("codes") as number)} a class, for ${grouped(coding.get("images") as number)} of its images: likenesses that can be rebuilt` : "none"],
    ["Seeds", `${picks ? `picked, ${picks.get("bits")} bits ${picks.has("stride") ? "a class" : "an image"}` : "in order"}, from ${pack.manifest.get("seed")}`],
    ["Weights", pack.sections.has("weights") ? "one for each image, for the loss of a training" : "none"],
    ["Arithmetic", `${r.get("dtype")}, groups of ${r.get("group")}`],
    ["Noise", String(r.get("noise"))],
  ]);
}

/** Return where the bytes are. */
export function ledgerTable(pack: Pack): HTMLElement {
  const rows = ledgerOf(pack);
  const most = Math.max(...rows.map(([, bytes]) => bytes));
  const bar = (bytes: number) => el("meter", { min: "0", max: String(most), value: String(bytes), "aria-hidden": "true" });
  const cells = rows.map(([name, bytes]) => [name, grouped(bytes), (bytes / pack.names.length).toFixed(1), bar(bytes)]);
  const total = ["file", grouped(pack.bytes), (pack.bytes / pack.names.length).toFixed(1), ""];
  return table("Bytes of the file by what they are spent on", ["part", "bytes", "a class", "share"], [...cells, total]);
}

/** Return provenance and the whole manifest, as text. */
export function manifestText(pack: Pack): string {
  return JSON.stringify(JSON.parse(canonical(pack.written)), null, 1);
}

/** Return the soft labels of the first images of a class, or nothing where labels are hard. */
export function labelsTable(pack: Pack, c: number): HTMLElement | undefined {
  const labels = softLabels(pack, c)?.slice(0, SHOWN_LABELS);
  if (!labels) return undefined;
  const text = (label: Float32Array) => Array.from(label, (mass, i) => [mass, i] as const)
    .sort((a, b) => b[0] - a[0]).slice(0, 3)
    .map(([mass, i]) => `${pack.names[i]} ${(100 * mass).toFixed(0)} %`).join(", ");
  const rows = labels.map((label, j) => [String(j), text(label)]);
  return el("details", {}, el("summary", {}, "Soft labels"), table(`Soft labels of the first images of ${pack.names[c]}`, ["image", "most of its mass"], rows));
}
