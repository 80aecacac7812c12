/** Elements without HTML: text from a file is only ever text. */

type Child = Node | string | undefined;

/** Return an element with attributes and children. */
export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K, attributes: Record<string, string> = {}, ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

/** Return a canvas that shows an image of bytes (3, H, W) and says what it is. */
export function picture(label: string, [height, width]: number[], image?: Uint8Array): HTMLCanvasElement {
  const canvas = el("canvas", { role: "img", "aria-label": label, title: label });
  [canvas.width, canvas.height] = [width, height];
  if (image) paint(canvas, image);
  return canvas;
}

export function paint(canvas: HTMLCanvasElement, image: Uint8Array): void {
  const area = canvas.width * canvas.height;
  const pixels = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < area; i++) {
    pixels.data.set([image[i], image[area + i], image[2 * area + i], 255], 4 * i);
  }
  canvas.getContext("2d")?.putImageData(pixels, 0, 0);
  canvas.dataset.made = "";
}

/** Return a table with a caption. */
export function table(caption: string, head: string[], rows: Child[][]): HTMLTableElement {
  return el("table", {}, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows.map(([first, ...cells]) =>
      el("tr", {}, el("th", { scope: "row" }, first), ...cells.map((cell) => el("td", {}, cell))))));
}

/** Return a list of names and values. */
export function facts(pairs: [string, string][]): HTMLDListElement {
  return el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

export const grouped = (value: number) => value.toLocaleString("en-GB");

/** Return a size in decimal units. */
export function size(bytes: number): string {
  if (bytes < 1e4) return `${grouped(bytes)} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(1)} kB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
