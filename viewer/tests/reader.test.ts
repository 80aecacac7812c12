/** The conformance corpus, file by file. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { canonical, parse, spellReal } from "../src/json.ts";
import { read, Refused } from "../src/reader.ts";

const VECTORS = join(import.meta.dirname, "../../spec/vectors");
const INDEX = JSON.parse(readFileSync(join(VECTORS, "index.json"), "utf8"));
const load = (path: string) => new Uint8Array(readFileSync(join(VECTORS, path)));

test("the corpus is listed completely", () => {
  for (const kind of ["valid", "invalid"]) {
    const files = readdirSync(join(VECTORS, kind)).filter((name) => name.endsWith(".d3m"));
    assert.deepEqual(files.map((name) => name.slice(0, -4)).sort(), Object.keys(INDEX[kind]).sort());
  }
});

for (const [name, { root, bytes }] of Object.entries<{ root: string; bytes: number }>(INDEX.valid)) {
  test(`reads ${name}`, async () => {
    const pack = await read(load(`valid/${name}.d3m`));
    assert.deepEqual([pack.root, pack.bytes], [root, bytes]);
    assert.equal(pack.names.length, pack.manifest.get("classes"));
  });
}

for (const [name, { code }] of Object.entries<{ code: string }>(INDEX.invalid)) {
  test(`refuses ${name} with ${code}`, async () => {
    await assert.rejects(read(load(`invalid/${name}.d3m`)), (error) => {
      assert.ok(error instanceof Refused, String(error));
      assert.equal(error.code, code, error.why);
      return true;
    });
  });
}

test("refuses a header of very many values before it is parsed", async () => {
  const header = new TextEncoder().encode(`{"a":[${"[],".repeat(500_000)}[]]}`);
  const data = new Uint8Array(8 + header.length);
  new DataView(data.buffer).setBigUint64(0, BigInt(header.length), true);
  data.set(header, 8);
  await assert.rejects(read(data), (error) => error instanceof Refused && error.code === "E_LIMIT");
});

test("refuses every truncation and every flipped bit of a file", async () => {
  const data = load("valid/smallest.d3m");
  for (let at = 0; at < data.length; at++) {
    await assert.rejects(read(data.subarray(0, at)), Refused);
    const flipped = data.slice();
    flipped[at] ^= 1 << at % 8;
    await assert.rejects(read(flipped), Refused);
  }
});

test("reals are spelled as in Python", () => {
  const spelled = ["1.0", "-0.0", "0.0001", "1e-05", "1.5e-07", "1e+16", "123456789012345.6", "5e-324", "1.7976931348623157e+308"];
  for (const text of spelled) assert.equal(spellReal(Number(text)), text);
});

test("keys are sorted by code point", () => {
  const text = canonical(parse('{"\\uffff":1,"\\ud83d\\ude00":2,"a":3}'));
  assert.equal(text, '{"a":3,"\\uffff":1,"\\ud83d\\ude00":2}');
});
