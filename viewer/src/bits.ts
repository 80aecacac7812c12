/** Streams of bits, least significant first, numbers of combinations, and half precision. */

/** Return `width` bits from bit `at` on. */
export function bitsAt(bytes: Uint8Array, at: number, width: number): bigint {
  const last = (at + width + 7) >> 3;
  let value = 0n;
  for (let i = last - 1; i >= at >> 3; i--) value = (value << 8n) | BigInt(bytes[i]);
  return (value >> BigInt(at & 7)) & ((1n << BigInt(width)) - 1n);
}

/** Return `width` bits, at most 32, from bit `at` on. */
export function smallBitsAt(bytes: Uint8Array, at: number, width: number): number {
  const byte = Math.floor(at / 8);
  const shift = at % 8;
  let value = 0;
  for (let i = Math.ceil((shift + width) / 8) - 1; i >= 0; i--) value = value * 256 + bytes[byte + i];
  return Math.floor(value / 2 ** shift) % 2 ** width;
}

/** Return whether all bits from bit `at` on are 0. */
export function isClear(bytes: Uint8Array, at: number): boolean {
  const byte = Math.floor(at / 8);
  return bytes.subarray(byte).every((value, i) => (i ? value : value >> (at % 8)) === 0);
}

/** Return how many bits an integer has; 0 has none. */
export function bitLength(value: bigint): number {
  return value ? value.toString(2).length : 0;
}

/** Return the binomial coefficient. */
export function combinations(n: number, k: number): bigint {
  let out = 1n;
  for (let i = 1; i <= k; i++) out = (out * BigInt(n - k + i)) / BigInt(i);
  return k > n ? 0n : out;
}

/** Return the number that half precision writes in 16 bits. */
export function halfToSingle(half: number): number {
  const sign = half >> 15 ? -1 : 1;
  const [exponent, fraction] = [(half >> 10) & 31, half & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

/** Return many numbers in half precision, little-endian, as single precision. */
export function singles(halves: Uint8Array): Float32Array {
  const table = Float32Array.from({ length: 2 ** 16 }, (_, half) => halfToSingle(half));
  const out = new Float32Array(halves.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = table[halves[2 * i] | (halves[2 * i + 1] << 8)];
  return out;
}
