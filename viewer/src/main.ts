/** The page: a file comes in, is verified, described and rebuilt. */

import { download, resolve, type Target } from "./address.ts";
import { params, real, recipe } from "./content.ts";
import { labelsTable, ledgerTable, manifestText, recipeFacts, summary } from "./describe.ts";
import { el, grouped, paint, picture } from "./dom.ts";
import { Pool } from "./pool.ts";
import { type Pack, read, Refused } from "./reader.ts";
import { compare, type ModelInfo, obstacle, type Pair, shrink } from "./rebuild.ts";

const FIRST_CLASSES = 20;
const FIRST_IMAGES = 8;
const MOST_IMAGES = 2000; // that one page holds

/** What the tests of the page read. */
const timings: Record<string, number> = { ready: 0 };
declare global {
  interface Window {
    viewer: { timings: Record<string, number>; read: typeof read; images: Map<string, Uint8Array> };
  }
}
const images = new Map<string, Uint8Array>(); // by "class image"
window.viewer = { timings, read, images };

const find = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const [status, result, form] = [find("status"), find("result"), find<HTMLFormElement>("open")];
const pool = new Pool();
const model = fetch("model/model.json").then((response) => (response.ok ? (response.json() as Promise<ModelInfo>) : undefined), () => undefined);

let opened = 0; // counts what was opened; what comes late for an earlier one is dropped

function say(text: string): void {
  status.textContent = text;
}

async function openFile(file: File): Promise<void> {
  const mine = ++opened;
  say(`Reading ${file.name}`);
  try {
    await show(new Uint8Array(await file.arrayBuffer()), { url: "", name: file.name, root: undefined }, mine);
  } catch (error) {
    if (mine === opened) fail(file.name, error);
  }
}

async function openAddress(text: string): Promise<void> {
  const mine = ++opened;
  try {
    const target = resolve(text, location.href);
    say(`Fetching ${target.name}`);
    await show(await download(target), target, mine);
  } catch (error) {
    if (mine === opened) fail(text, error);
  }
}

/** Verify a file and show what it holds. */
async function show(data: Uint8Array, { name, root }: Target, mine: number): Promise<void> {
  if (mine !== opened) return;
  pool.close();
  images.clear();
  const start = performance.now();
  const pack = await read(data);
  timings.verify = performance.now() - start;
  if (root && root !== pack.root) throw new Error(`The pack has the root ${pack.root}, not the one of the address.`);
  if (mine !== opened) return;
  const verdict = el("p", { class: "verdict good" }, el("strong", {}, "Valid. "),
    `Every hash and every rule was checked in ${timings.verify.toFixed(0)} ms.`);
  const gallery = new Gallery(pack);
  result.replaceChildren(
    el("h2", { id: "name", tabindex: "-1" }, name), verdict, summary(pack),
    gallery.element,
    el("section", { class: "columns" },
      el("div", {}, el("h3", {}, "Bytes"), ledgerTable(pack)),
      el("div", {}, el("h3", {}, "Recipe"), recipeFacts(pack))),
    el("details", {}, el("summary", {}, "Manifest"), el("pre", { tabindex: "0" }, manifestText(pack))),
  );
  say(`${name} is valid: ${grouped(pack.names.length)} classes, ${grouped(pack.imagesPerClass)} images each.`);
  find("name").focus();
  await gallery.start(data, mine);
}

function fail(name: string, error: unknown): void {
  const [title, why] = error instanceof Refused
    ? [`Refused: ${error.code}. `, `${error.why}. This is not a valid pack; nothing of it is shown.`]
    : ["Not opened. ", error instanceof Error ? error.message : String(error)];
  pool.close();
  result.replaceChildren(el("h2", { id: "name", tabindex: "-1" }, name), el("p", { class: "verdict bad" }, el("strong", {}, title), why));
  say(`${name}: ${title}${why}`);
  find("name").focus();
}

/** The images of a pack, class by class, with its probes. */
class Gallery {
  readonly element = el("section", { "aria-labelledby": "images" }, el("h3", { id: "images" }, "Images"));
  private readonly note = el("p", {}, "Waiting for the backbone.");
  private readonly progress = el("progress", { value: "0", max: "1", "aria-label": "Images made" });
  private readonly controls = el("p", { class: "controls" });
  private readonly probes = el("div", { class: "probes" });
  private readonly rows = el("div", { class: "classes" });
  private readonly rest = el("button", { type: "button" });
  private readonly halt = el("button", { type: "button" }, "Stop");
  private readonly more = el("button", { type: "button" }, "Show more classes");
  private readonly canvases = new Map<string, HTMLCanvasElement>();
  private readonly size: number[];
  private asked = 0;
  private shown = 0; // classes
  private begun = 0;

  constructor(private readonly pack: Pack) {
    this.size = recipe(pack).get("size") as number[];
    this.element.append(this.note, this.progress, this.controls, this.probes, this.rows);
    this.element.append(this.more);
    this.more.addEventListener("click", () => this.showMore());
    this.showClasses(FIRST_CLASSES);
    this.showProbes();
  }

  /** Make the first images, where this page has the backbone. */
  async start(data: Uint8Array, mine: number): Promise<void> {
    const info = await model;
    if (mine !== opened) return;
    const why = info ? obstacle(this.pack, info) : "The networks are not beside this page: see viewer/README.md.";
    if (why) {
      this.note.textContent = `Not rebuilt here. ${why}`;
      this.progress.remove();
      this.element.classList.add("described");
      return;
    }
    const [most, total] = [this.everything().length, this.pack.names.length * this.pack.imagesPerClass];
    this.rest.append(`Rebuild ${most === total ? "all " : ""}${grouped(most)} images`);
    this.rest.addEventListener("click", () => this.all());
    this.halt.addEventListener("click", () => this.stop());
    this.controls.append(this.rest, this.halt);
    this.note.textContent = "Loading the backbone (23 MB, once).";
    this.begun = performance.now();
    const rows = real(recipe(this.pack).get("guidance")) === 1 ? 1 : 2;
    await pool.open(data, rows, {
      made: (pair, image) => mine === opened && this.made(pair, image),
      idle: () => mine === opened && this.idle(),
      failed: (message) => mine === opened && this.failed(message),
    });
    if (mine !== opened) return;
    this.ask(this.first());
  }

  private first(): Pair[] {
    const count = Math.min(FIRST_IMAGES, this.pack.imagesPerClass);
    const pairs = this.probePairs();
    for (let c = 0; c < this.shown; c++) for (let j = 0; j < count; j++) pairs.push([c, j]);
    return pairs;
  }

  private ask(pairs: Pair[]): void {
    const wanted = new Map(pairs.map((pair) => [pair.join(" "), pair]));
    const fresh = [...wanted].filter(([key]) => !images.has(key)).map(([, pair]) => pair);
    this.asked = images.size + fresh.length;
    pool.make(fresh);
    this.advance();
  }

  private all(): void {
    const pairs = this.everything();
    this.showClasses(pairs[pairs.length - 1][0] + 1);
    pool.stop();
    for (const [c, j] of pairs) this.canvas(c, j);
    this.begun = performance.now() - (images.size ? this.elapsed() : 0);
    this.ask(pairs);
    this.halt.focus();
    say(`Rebuilding ${grouped(pairs.length)} images.`);
  }

  /** Return the images of all classes, the first ones where there are too many for a page. */
  private everything(): Pair[] {
    const classes = Math.min(this.pack.names.length, MOST_IMAGES);
    const count = Math.min(this.pack.imagesPerClass, Math.floor(MOST_IMAGES / classes));
    return Array.from({ length: classes * count }, (_, i): Pair => [Math.floor(i / count), i % count]);
  }

  private showMore(): void {
    this.showClasses(this.shown + FIRST_CLASSES);
    if (this.begun) this.ask(this.first());
    say(`${grouped(this.shown)} of ${grouped(this.pack.names.length)} classes are shown.`);
  }

  private elapsed(): number {
    return performance.now() - this.begun;
  }

  private stop(): void {
    pool.stop();
    this.asked = images.size;
    this.advance();
    this.rest.focus(); // not lost with the button that is now disabled
    say(`Stopped after ${grouped(images.size)} images.`);
  }

  private made([c, j]: Pair, image: Uint8Array): void {
    if (!images.size) timings.firstImage = this.elapsed();
    images.set(`${c} ${j}`, image);
    timings.lastImage = this.elapsed();
    const canvas = this.canvases.get(`${c} ${j}`);
    if (canvas) paint(canvas, image);
    this.compareProbes();
    this.advance();
  }

  private advance(): void {
    const rate = (images.size - 1) / ((timings.lastImage - timings.firstImage) / 1000);
    const speed = images.size > 8 ? `, ${rate.toFixed(1)} a second` : "";
    this.rest.disabled = this.asked >= this.everything().length;
    this.halt.disabled = images.size >= this.asked;
    this.progress.max = Math.max(1, this.asked);
    this.progress.value = images.size;
    if (images.size) this.note.textContent = `${grouped(images.size)} of ${grouped(this.asked)} images${speed}, made in this page.`;
  }

  private idle(): void {
    if (!images.size || pool.waiting) return;
    this.asked = images.size;
    this.advance();
    timings.done = timings.lastImage;
    say(`${grouped(images.size)} images are rebuilt.`);
  }

  private failed(message: string): void {
    this.note.textContent = `The images could not be made: ${message}`;
    say(this.note.textContent);
  }

  private showClasses(upTo: number): void {
    const count = Math.min(upTo, this.pack.names.length);
    this.more.hidden = count === this.pack.names.length;
    for (; this.shown < count; this.shown++) {
      const c = this.shown;
      const labels = labelsTable(this.pack, c);
      this.rows.append(el("div", { class: "class", role: "group", "aria-label": this.pack.names[c] },
        el("h4", {}, this.pack.names[c]), el("div", { class: "strip" }), labels));
      for (let j = 0; j < Math.min(FIRST_IMAGES, this.pack.imagesPerClass); j++) this.canvas(c, j);
    }
  }

  /** Return the canvas of an image; it is added where there is none. */
  private canvas(c: number, j: number): HTMLCanvasElement {
    const key = `${c} ${j}`;
    const known = this.canvases.get(key);
    if (known) return known;
    const canvas = picture(`${this.pack.names[c]}, image ${j}`, this.size, images.get(key));
    this.rows.children[c].querySelector(".strip")?.append(canvas);
    this.canvases.set(key, canvas);
    return canvas;
  }

  private probePairs(): Pair[] {
    const [labels, indices] = ["labels", "indices"].map((name) => this.pack.arrays.get(`probes.${name}`));
    return labels && indices ? Array.from(labels, (c, i): Pair => [c, indices[i]]) : [];
  }

  private probe(i: number): Uint8Array {
    const [, h, w] = params(this.pack, "probes")?.get("shape") as number[];
    return (this.pack.arrays.get("probes.images") as Uint8Array).subarray(3 * h * w * i, 3 * h * w * (i + 1));
  }

  private showProbes(): void {
    const pairs = this.probePairs();
    if (!pairs.length) return;
    const small = (params(this.pack, "probes")?.get("shape") as number[]).slice(1);
    const shown = pairs.slice(0, 16).map(([c, j], i) =>
      el("figure", {}, picture(`Stored probe of ${this.pack.names[c]}, image ${j}`, small, this.probe(i)),
        picture(`Rebuilt probe of ${this.pack.names[c]}, image ${j}`, small), el("figcaption", {}, "stored, rebuilt")));
    this.probes.append(...shown, el("p", { id: "probes" }, `${pairs.length === 1 ? "A probe" : `${pairs.length} probes`} to compare with.`));
  }

  /** Say how far the rebuilt probes are from the stored ones, once all are there. */
  private compareProbes(): void {
    const pairs = this.probePairs();
    const made = pairs.map((pair) => images.get(pair.join(" ")));
    if (!pairs.length || made.includes(undefined) || this.probes.dataset.verdict) return;
    const small = (params(this.pack, "probes")?.get("shape") as number[]).slice(1);
    const rebuilt = (made as Uint8Array[]).map((image) => shrink(image, this.size, small));
    this.probes.querySelectorAll("figure").forEach((figure, i) => paint(figure.children[1] as HTMLCanvasElement, rebuilt[i]));
    const joined = (parts: Uint8Array[]) => Uint8Array.from(parts.flatMap((part) => [...part]));
    const gap = compare(joined(pairs.map((_, i) => this.probe(i))), joined(rebuilt));
    this.probes.dataset.verdict = gap.verdict;
    const text = `Probes: ${gap.verdict}. The worst of their values is off by ${gap.peak} of 255, the root mean square is ${gap.rms.toFixed(3)}.`;
    find("probes").replaceChildren(el("strong", {}, text.split(". ")[0], ". "), text.split(". ").slice(1).join(". "));
    say(text);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void openAddress(find<HTMLInputElement>("address").value);
});
find<HTMLInputElement>("file").addEventListener("change", ({ target }) => {
  const [file] = (target as HTMLInputElement).files ?? [];
  if (file) void openFile(file);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover");
    const file = kind === "drop" ? (event as DragEvent).dataTransfer?.files[0] : undefined;
    if (file) void openFile(file);
  });
}
void model.then((info) => (find("terms").hidden = !info));
// whoever is about to choose a pack waits less for its images
const warm = async () => (await model) && pool.warm();
form.addEventListener("focusin", warm, { once: true });
document.addEventListener("dragenter", warm, { once: true });
const given = new URL(location.href).searchParams.get("pack");
if (given) void openAddress(given);
timings.ready = performance.now();
