/** Read files from stdin, each after its length in four bytes; print a code of each, or "valid". */

import { readFileSync } from "node:fs";
import { read, Refused } from "../src/reader.ts";

const input = readFileSync(0);
for (let at = 0; at < input.length; ) {
  const size = input.readUInt32LE(at);
  const data = new Uint8Array(input.subarray(at + 4, at + 4 + size));
  at += 4 + size;
  const code = await read(data).then(() => "valid", (error) => (error instanceof Refused ? error.code : String(error)));
  console.log(code);
}
