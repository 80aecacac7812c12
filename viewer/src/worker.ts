/** A worker that holds the networks and makes images, one batch at a time. */

import type * as Ort from "onnxruntime-web";
import { singles } from "./bits.ts";
import { Levels } from "./levels.ts";
import { Noise, quantiles } from "./noise.ts";
import { digest, read } from "./reader.ts";
import { type ModelInfo, type Networks, type Pair, Rebuilder } from "./rebuild.ts";
import { Tokenizer } from "./tokenizer.ts";

export type Request =
  | { kind: "load"; gpu: boolean }
  | { kind: "open"; id: number; pack: Uint8Array }
  | { kind: "make"; id: number; pairs: Pair[] };
export type Reply =
  | { kind: "ready" }
  | { kind: "made"; id: number; pairs: Pair[]; images: Uint8Array[] }
  | { kind: "failed"; message: string };

type Files = Record<string, Promise<Uint8Array>>;

const BASE = new URL("./", self.location.href);
let loaded: ReturnType<typeof load> | undefined;
let rebuilder: Rebuilder | undefined;

async function file(path: string): Promise<Uint8Array> {
  const response = await fetch(new URL(path, BASE));
  if (!response.ok) throw new Error(`${path} is not beside the page (${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

async function load(gpu: boolean) {
  const info = JSON.parse(new TextDecoder().decode(await file("model/model.json"))) as ModelInfo;
  // all are on their way while networks are made of the first
  const files: Files = Object.fromEntries(Object.keys(info.files).map((name) => [name, checked(name, info)]));
  const quantilesFile = file("model/normal16.f32");
  for (const begun of [...Object.values(files), quantilesFile]) begun.catch(() => undefined); // reported where it is awaited
  const networks = await open(files, gpu);
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(await files["tokenizer.json"])));
  return { info, networks, tokenizer, table: await quantiles(await quantilesFile) };
}

async function checked(name: string, info: ModelInfo): Promise<Uint8Array> {
  const data = await file(`model/${name}`);
  if ((await digest(data)) !== info.files[name][1]) throw new Error(`model/${name} has been changed`);
  return data;
}

/** Open the networks on a GPU where that works, else in WebAssembly. */
async function open(files: Files, gpu: boolean): Promise<Networks> {
  if (gpu) {
    try {
      const ort = (await import("onnxruntime-web/webgpu")) as typeof Ort;
      return await openNetworks(ort, "ort-wasm-simd-threaded.asyncify.wasm", { executionProviders: ["webgpu"] }, files);
    } catch (error) {
      console.warn("WebGPU does not run the networks:", error);
    }
  }
  const ort = (await import("onnxruntime-web/wasm")) as typeof Ort;
  // the optimiser would take longer than it saves: the exported graphs leave it little to do
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "disabled" } as const;
  return openNetworks(ort, "ort-wasm-simd-threaded.wasm", options, files);
}

async function openNetworks(ort: typeof Ort, wasm: string, options: Ort.InferenceSession.SessionOptions, files: Files): Promise<Networks> {
  ort.env.wasm.numThreads = 1; // the page has several workers, which need no isolation from other origins
  ort.env.wasm.wasmPaths = { wasm: new URL(`ort/${wasm}`, BASE).href };
  const session = async (name: string) => {
    const weights = singles(await files[`${name}.f16`]);
    const externalData = [{ path: "weights", data: new Uint8Array(weights.buffer) }];
    return ort.InferenceSession.create(await files[`${name}.onnx`], { ...options, externalData });
  };
  const text = await session("text");
  const denoiser = await session("denoiser");
  const decoder = await session("decoder");
  const tensor = (data: Float32Array, dims: number[]) => new ort.Tensor("float32", data, dims);
  const only = async (net: Ort.InferenceSession, feeds: Record<string, Ort.Tensor>) =>
    (await net.run(feeds))[net.outputNames[0]].data as Float32Array;
  return {
    encode: (ids, vectors, learned) =>
      only(text, {
        ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
        vectors: tensor(vectors, [1, ids.length, vectors.length / ids.length]),
        learned: tensor(learned, [1, ids.length, 1]),
      }),
    denoise: (x, shape, timestep, hidden, tokens) =>
      only(denoiser, {
        x_t: tensor(x, shape),
        timestep: tensor(Float32Array.of(timestep), []),
        hidden: tensor(hidden, [shape[0], tokens, hidden.length / shape[0] / tokens]),
      }),
    decode: (latents, shape) => only(decoder, { latents: tensor(latents, shape) }),
  };
}

async function answer(request: Request): Promise<Reply> {
  if (request.kind === "load") {
    loaded ??= load(request.gpu);
    await loaded;
    return { kind: "ready" };
  }
  if (request.kind === "open") {
    const pack = await read(request.pack);
    const { info, networks, tokenizer, table } = await (loaded as NonNullable<typeof loaded>);
    const noise = new Noise(table, pack.manifest.get("seed") as string);
    rebuilder = new Rebuilder(pack, { info, levels: new Levels(info.sigmas, info.prediction), networks, noise, tokenizer });
    return { kind: "ready" };
  }
  const { id, pairs } = request;
  return { kind: "made", id, pairs, images: await (rebuilder as Rebuilder).images(pairs) };
}

let last: Promise<void> = Promise.resolve();
self.onmessage = ({ data }: MessageEvent<Request>) => {
  // one after the other: a session does not run twice at a time
  last = last.then(async () => {
    const failed = (error: unknown): Reply => ({ kind: "failed", message: error instanceof Error ? error.message : String(error) });
    self.postMessage(await answer(data).catch(failed));
  });
};
