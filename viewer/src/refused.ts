/** The refusal of a file: the first broken rule, by its code of section 11. */
export class Refused extends Error {
  constructor(
    readonly code: string,
    readonly why: string,
  ) {
    super(`${code}: ${why}`);
    this.name = "Refused";
  }
}

/** Refuse the file unless a rule holds. */
export function need(holds: boolean, code: string, why: string): asserts holds {
  if (!holds) throw new Refused(code, why);
}
