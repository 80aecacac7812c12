/** Where a pack is fetched from: a URL, or an address on the Hugging Face Hub. */

const HUB = "https://huggingface.co";
const ADDRESS = /^hf:\/\/datasets\/([\w.-]+\/[\w.-]+)(?:@(refs\/[^/]+\/[^/]+|[^/]+))?\/(.+)$/;
const PIN = /^sha256=[0-9a-f]{64}$/;

export interface Target {
  url: string;
  name: string;
  root: string | undefined; // that the pack must have
}

/** Return where to fetch a pack; throw where the text is no address. */
export function resolve(text: string, page: string): Target {
  const [location, ...rest] = text.trim().split("#");
  const pin = rest.join("#");
  if (rest.length && !PIN.test(pin)) throw new Error("The part after # must be sha256= and 64 hex digits.");
  const root = pin ? pin.slice("sha256=".length) : undefined;
  const name = location.split("/").at(-1) as string;
  if (!location.startsWith("hf://")) {
    const url = new URL(location, page);
    const isLocal = url.origin === new URL(page).origin;
    if (!isLocal && url.protocol !== "https:") throw new Error("Only https:// and hf:// addresses are fetched.");
    return { url: url.href, name, root };
  }
  const match = ADDRESS.exec(location);
  if (!match) throw new Error("Expected hf://datasets/org/name/file.d3m, with @revision after the name if needed.");
  const [, repo, revision, file] = match;
  const parts = file.split("/").map((part) => encodeURIComponent(decodeURIComponent(part)));
  const commit = encodeURIComponent(decodeURIComponent(revision ?? "main"));
  return { url: `${HUB}/datasets/${repo}/resolve/${commit}/${parts.join("/")}`, name, root };
}

/** Fetch a pack, without cookies and without saying which page asks. */
export async function download({ url }: Target): Promise<Uint8Array> {
  const response = await fetch(url, { credentials: "omit", referrerPolicy: "no-referrer" });
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  return new Uint8Array(await response.arrayBuffer());
}
