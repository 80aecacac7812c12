/** Canonical JSON: section 2 of the specification. */

import { need, Refused } from "./refused.ts";

/** A number with a point or an exponent; an integer is a `number`. */
export class Real {
  constructor(readonly value: number) {}
}

export type Json = null | boolean | number | Real | string | Json[] | JsonObject;
export type JsonObject = Map<string, Json>;

const MAX_LEVELS = 32;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y;
const PLAIN = /[^"\\\x00-\x1f]*/y;
const SPACE = /[ \t\n\r]*/y;
const HEX4 = /^[0-9a-fA-F]{4}$/;
const ESCAPES: Record<string, string> = {
  '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t",
};
const WORDS: [string, Json][] = [["null", null], ["true", true], ["false", false]];

/** Return the value of a text, or refuse it with E_JSON. Of a repeated key the last value counts. */
export function parse(text: string): Json {
  const parser = new Parser(text);
  const value = parser.value(0);
  parser.space();
  need(parser.at === text.length, "E_JSON", `unexpected text at character ${parser.at}`);
  return value;
}

class Parser {
  at = 0;

  constructor(readonly text: string) {}

  space(): void {
    this.take(SPACE);
  }

  value(level: number): Json {
    this.space();
    const next = this.text[this.at];
    if (next === "{" || next === "[") {
      need(level < MAX_LEVELS, "E_JSON", `more than ${MAX_LEVELS} levels`);
      this.at += 1;
      return next === "{" ? this.object(level) : this.array(level);
    }
    if (next === '"') return this.string();
    for (const [word, value] of WORDS) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    return this.number();
  }

  private object(level: number): JsonObject {
    const object: JsonObject = new Map();
    if (this.is("}")) return object;
    do {
      this.space();
      const key = this.string();
      need(this.is(":"), "E_JSON", `expected ':' at character ${this.at}`);
      object.set(key, this.value(level + 1));
    } while (this.is(","));
    need(this.is("}"), "E_JSON", `expected '}' at character ${this.at}`);
    return object;
  }

  private array(level: number): Json[] {
    const array: Json[] = [];
    if (this.is("]")) return array;
    do array.push(this.value(level + 1));
    while (this.is(","));
    need(this.is("]"), "E_JSON", `expected ']' at character ${this.at}`);
    return array;
  }

  private string(): string {
    need(this.text[this.at] === '"', "E_JSON", `expected a string at character ${this.at}`);
    this.at += 1;
    let out = "";
    for (;;) {
      out += this.take(PLAIN);
      const next = this.text[this.at++];
      if (next === '"') break;
      need(next === "\\", "E_JSON", "a string is cut short, or holds a control character");
      out += this.escape();
    }
    need(out.isWellFormed(), "E_JSON", "a lone surrogate");
    return out;
  }

  private escape(): string {
    const letter = this.text[this.at++] ?? "";
    if (letter !== "u") {
      need(letter in ESCAPES, "E_JSON", `unknown escape at character ${this.at}`);
      return ESCAPES[letter];
    }
    const digits = this.text.slice(this.at, this.at + 4);
    need(HEX4.test(digits), "E_JSON", `invalid escape at character ${this.at}`);
    this.at += 4;
    return String.fromCharCode(parseInt(digits, 16));
  }

  private number(): number | Real {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (!match) throw new Refused("E_JSON", `expected a value at character ${this.at}`);
    this.at += match[0].length;
    const value = Number(match[0]);
    if (match[1] !== undefined || match[2] !== undefined) {
      need(Number.isFinite(value), "E_JSON", `number ${match[0].slice(0, 20)} is out of range`);
      return new Real(value);
    }
    need(Number.isSafeInteger(value), "E_JSON", "an integer beyond 2^53 - 1");
    return value;
  }

  private is(token: string): boolean {
    this.space();
    const found = this.text[this.at] === token;
    if (found) this.at += 1;
    return found;
  }

  private take(pattern: RegExp): string {
    pattern.lastIndex = this.at;
    const match = pattern.exec(this.text) as RegExpExecArray; // each pattern matches ""
    this.at += match[0].length;
    return match[0];
  }
}

/** Return the one spelling of a value. */
export function canonical(value: Json): string {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "number") return Object.is(value, -0) ? "0" : String(value);
  if (typeof value === "string") return quote(value);
  if (value instanceof Real) return spellReal(value.value);
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  const keys = [...value.keys()].sort(compareStrings);
  return `{${keys.map((key) => `${quote(key)}:${canonical(value.get(key) as Json)}`).join(",")}}`;
}

/** Return a JSON string in ASCII. */
export function quote(text: string): string {
  return JSON.stringify(text).replace(
    /[^\x20-\x7e]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Return the shortest digits that read back as the same number, as Python spells them. */
export function spellReal(value: number): string {
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  const [mantissa, power] = Math.abs(value).toExponential().split("e");
  const digits = mantissa.replace(".", "");
  const exponent = Number(power);
  if (exponent < -4 || exponent > 15) {
    const tail = digits.length > 1 ? `.${digits.slice(1)}` : "";
    const shown = String(Math.abs(exponent)).padStart(2, "0");
    return `${sign}${digits[0]}${tail}e${exponent < 0 ? "-" : "+"}${shown}`;
  }
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${digits}`;
  const whole = digits.slice(0, exponent + 1).padEnd(exponent + 1, "0");
  return `${sign}${whole}.${digits.slice(exponent + 1) || "0"}`;
}

/** Order strings by code points; JavaScript's own order is that of UTF-16 units. */
export function compareStrings(a: string, b: string): number {
  const [left, right] = [[...a], [...b]];
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const gap = (left[i].codePointAt(0) as number) - (right[i].codePointAt(0) as number);
    if (gap) return gap;
  }
  return left.length - right.length;
}
