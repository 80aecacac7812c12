/** Bundle the page into dist/, or with --tests the tests into dist-tests/. */

import { copyFileSync, existsSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { build } from "esbuild";

const HERE = import.meta.dirname;
const isTests = process.argv.includes("--tests");
const shared = { absWorkingDir: HERE, bundle: true, format: "esm", target: "es2022", logLevel: "warning" };

if (isTests) {
  rmSync(`${HERE}/dist-tests`, { recursive: true, force: true });
  const entryPoints = ["verdicts.ts", ...readdirSync(`${HERE}/tests`).filter((name) => name.endsWith(".test.ts"))];
  await build({
    ...shared,
    entryPoints: entryPoints.map((name) => `tests/${name}`),
    outdir: "dist-tests",
    outExtension: { ".js": ".mjs" },
    platform: "node",
    packages: "external",
  });
} else {
  await page();
}

/** Bundle page and worker, and put beside them what they fetch: the networks, WebAssembly, their terms, and examples. */
async function page() {
  const out = `${HERE}/dist`;
  rmSync(out, { recursive: true, force: true });
  await build({
    ...shared,
    entryPoints: ["src/main.ts", "src/worker.ts"],
    outdir: "dist",
    splitting: true,
    minify: true,
    legalComments: "none",
  });
  const copy = (from, to, name = from.split("/").at(-1)) => {
    mkdirSync(`${out}/${to}`, { recursive: true });
    copyFileSync(`${HERE}/${from}`, `${out}/${to}/${name}`);
  };
  for (const name of ["index.html", "style.css", "icon.svg"]) copy(name, ".");
  const packs = readdirSync(`${HERE}/../examples`).filter((name) => name.endsWith(".d3m"));
  for (const name of packs) copy(`../examples/${name}`, ".");
  const ort = "node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded";
  for (const kind of ["", ".asyncify"]) copy(`${ort}${kind}.wasm`, "ort");
  copy("../mini/LICENSE.onnxruntime", "ort", "LICENSE.txt");
  copy("../d3pack/decode/normal16.f32", "model");
  if (!existsSync(`${HERE}/model/model.json`)) {
    console.warn("viewer/model is empty: run `python viewer/export_onnx.py` first, or images are not rebuilt");
    return;
  }
  for (const name of readdirSync(`${HERE}/model`)) copy(`model/${name}`, "model");
  copy("../mini/LICENSE", "model", "LICENSE.txt"); // who passes the weights on passes their terms on
}
