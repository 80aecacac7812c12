/**
 * Drive the page in headless Chromium and print what was seen as JSON.
 *
 *     node tests/page.mjs URL [--images N] [--pixels FILE] [--shots FOLDER] [--corpus FOLDER]
 *
 * Opens URL, which names a pack; waits until N images are made and saves their bytes; saves
 * screenshots in light, dark and phone width; reads every file of the corpus with the page's reader.
 */

import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import puppeteer from "puppeteer-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    chromium: { type: "string", default: "/usr/bin/chromium" },
    corpus: { type: "string" },
    images: { type: "string", default: "0" },
    pixels: { type: "string" },
    seconds: { type: "string", default: "300" },
    shots: { type: "string" },
  },
});
const wanted = Number(values.images);
const text = (page, selector) => page.$eval(selector, (element) => element.textContent);
const browser = await puppeteer.launch({ executablePath: values.chromium, args: ["--no-sandbox"], headless: true });
try {
  console.log(JSON.stringify(await visit(await browser.newPage()), null, 1));
} finally {
  await browser.close();
}

async function visit(page) {
  const problems = [];
  const hosts = new Set();
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("request", (request) => hosts.add(new URL(request.url()).host));
  await page.setViewport({ width: 1100, height: 900 });
  await page.goto(positionals[0]);
  await page.waitForSelector("#name");
  const seen = { heading: await text(page, "#name"), verdict: await text(page, ".verdict"), body: await text(page, "#result") };
  if (wanted) {
    const timeout = 1000 * Number(values.seconds);
    await page.waitForFunction((count) => window.viewer.images.size >= count, { timeout }, wanted);
    await page.waitForFunction(() => window.viewer.timings.done, { timeout });
    seen.probes = await page.evaluate(() => document.getElementById("probes")?.textContent);
    seen.note = await text(page, "#images + p");
    seen.enabled = await page.$$eval(".controls button:enabled", (buttons) => buttons.map((button) => button.textContent));
  }
  seen.timings = await page.evaluate(() => window.viewer.timings);
  if (values.pixels) {
    const images = await page.evaluate(() => [...window.viewer.images].map(([key, image]) => [key, [...image]]));
    writeFileSync(values.pixels, JSON.stringify(Object.fromEntries(images)));
  }
  seen.unnamed = await page.evaluate(unnamed);
  seen.tabs = await tabs(page);
  if (values.shots) await shoot(page);
  if (wanted) seen.again = await again(page);
  if (values.corpus) seen.corpus = await corpus(page);
  return { ...seen, hosts: [...hosts], problems };
}

/** Open the same pack by keyboard; return its first image made anew and the workers in use. */
async function again(page) {
  await page.focus("#address");
  await page.keyboard.type(new URL(positionals[0]).searchParams.get("pack"));
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => window.viewer.images.size === 1, { polling: 5 });
  const image = await page.evaluate(() => [...window.viewer.images.values()][0].slice(0, 8).join(" "));
  return { image, workers: page.workers().length };
}

/** Return the controls and pictures that a screen reader has no name for. */
function unnamed() {
  const named = (element) =>
    element.labels?.length || element.getAttribute("aria-label") || element.textContent.trim() || element.tagName === "METER";
  const all = document.querySelectorAll("input, button, summary, canvas, progress, meter, table");
  return [...all].filter((element) => !named(element)).map((element) => element.outerHTML.slice(0, 80));
}

/** Return what the Tab key reaches from the top of the page. */
async function tabs(page) {
  await page.evaluate(() => {
    document.body.tabIndex = -1;
    document.body.focus();
  });
  const reached = [];
  for (let i = 0; i < 8; i++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent.slice(0, 40)));
  }
  return reached;
}

async function corpus(page) {
  const codes = {};
  for (const kind of ["valid", "invalid"]) {
    for (const name of readdirSync(join(values.corpus, kind)).filter((file) => file.endsWith(".d3m"))) {
      const data = readFileSync(join(values.corpus, kind, name)).toString("base64");
      codes[`${kind}/${name.slice(0, -4)}`] = await page.evaluate(async (encoded) => {
        const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
        return window.viewer.read(bytes).then(() => "valid", (error) => error.code ?? String(error));
      }, data);
    }
  }
  return codes;
}

async function shoot(page) {
  for (const [name, scheme, width] of [["light", "light", 1100], ["dark", "dark", 1100], ["phone", "light", 375]]) {
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.setViewport({ width, height: 900 });
    await page.screenshot({ path: join(values.shots, `${name}.png`), fullPage: true });
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (overflow > 0) throw new Error(`${name}: the page is ${overflow} pixels wider than the window`);
  }
}
