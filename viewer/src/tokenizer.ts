/** The tokenizer of CLIP: byte pairs of lower-case words, from a tokenizer.json. */

const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
const END_OF_WORD = "</w>";
const BYTES = byteLetters();

interface TokenizerFile {
  added_tokens: { id: number; content: string }[];
  model: { vocab: Record<string, number>; merges: ([string, string] | string)[] };
}

export class Tokenizer {
  readonly start: number;
  readonly end: number;
  private readonly vocab: Map<string, number>;
  private readonly ranks: Map<string, number>;
  private readonly special: Map<string, number>;

  constructor({ added_tokens, model }: TokenizerFile) {
    this.vocab = new Map(Object.entries(model.vocab));
    this.ranks = new Map(model.merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
    this.special = new Map(added_tokens.map(({ id, content }) => [content, id]));
    this.start = this.special.get("<|startoftext|>") as number;
    this.end = this.special.get("<|endoftext|>") as number;
  }

  /** Return the ids of the words of a text; a special token in it stands for itself. */
  ids(text: string): number[] {
    const ids: number[] = [];
    for (const part of text.split(/(<\|startoftext\|>|<\|endoftext\|>)/)) {
      const special = this.special.get(part);
      if (special === undefined) ids.push(...this.words(part));
      else ids.push(special);
    }
    return ids;
  }

  private words(text: string): number[] {
    const normal = text.normalize("NFC").replace(/\s+/gu, " ").toLowerCase();
    return (normal.match(WORD) ?? []).flatMap((word) => this.pieces(word));
  }

  private pieces(word: string): number[] {
    const letters = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
    letters.push(letters.pop() + END_OF_WORD);
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < letters.length; i++) {
        const rank = this.ranks.get(`${letters[i]} ${letters[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      letters.splice(at, 2, letters[at] + letters[at + 1]);
    }
    return letters.map((piece) => this.vocab.get(piece) ?? this.end);
  }
}

/** Return the printable letter that stands for each byte. */
function byteLetters(): string[] {
  const isPlain = (b: number) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(isPlain(b) ? b : next++));
}
