/** Bundle the page into dist/, or with --tests the tests into dist-tests/. */

import { readdirSync, rmSync } from "node:fs";
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
}
