/** Workers that make the images of one pack; the page stays responsive, and needs no shared memory. */

import type { Pair } from "./rebuild.ts";
import type { Reply, Request } from "./worker.ts";

const MOST_WORKERS = 4;
const FIRST = 1; // images of the first batch, so that one is seen soon
const BATCH = 16; // rows of later ones: where a pass is fastest

export interface Events {
  made(pair: Pair, image: Uint8Array): void;
  idle(): void;
  failed(message: string): void;
}

interface Member {
  worker: Worker;
  busy: boolean;
}

export class Pool {
  private readonly members: Member[] = [];
  private readonly queue: Pair[] = [];
  private most = 1;
  private batch = FIRST;
  private events: Events | undefined;
  private pack: Uint8Array = new Uint8Array();
  private rows = 1; // of the denoiser for an image: two with guidance
  private gpu = false;

  /** Take another pack; what was queued for the one before is dropped. */
  async open(pack: Uint8Array, rows: number, events: Events): Promise<void> {
    this.close();
    [this.pack, this.rows, this.events] = [pack, rows, events];
    this.gpu = await hasGpu();
    if (this.events !== events) return; // another pack was opened meanwhile
    this.most = this.gpu ? 1 : Math.min(navigator.hardwareConcurrency || 1, MOST_WORKERS);
    this.start();
  }

  /** Add images to make. */
  make(pairs: Pair[]): void {
    this.queue.push(...pairs);
    for (const member of this.members) this.next(member);
  }

  /** Forget what is queued; a batch that was begun is finished. */
  stop(): void {
    this.queue.length = 0;
  }

  close(): void {
    this.stop();
    for (const { worker } of this.members.splice(0)) worker.terminate();
    [this.events, this.batch] = [undefined, FIRST];
  }

  get waiting(): number {
    return this.queue.length;
  }

  private start(): void {
    const worker = new Worker(new URL("worker.js", document.baseURI), { type: "module" });
    const member = { worker, busy: true };
    this.members.push(member);
    worker.onmessage = ({ data }: MessageEvent<Reply>) => this.answer(member, data);
    worker.onerror = (event) => this.events?.failed(event.message || "a worker could not be started");
    this.send(member, { kind: "open", pack: this.pack, gpu: this.gpu });
  }

  private send({ worker }: Member, request: Request): void {
    worker.postMessage(request);
  }

  private answer(member: Member, reply: Reply): void {
    member.busy = false;
    if (reply.kind === "failed") {
      this.stop();
      this.events?.failed(reply.message);
      return;
    }
    if (reply.kind === "made") {
      reply.pairs.forEach((pair, i) => this.events?.made(pair, reply.images[i]));
      // the others are started once the first has shown an image: loading takes processor time
      if (this.members.length < this.most && this.queue.length) this.start();
    }
    this.next(member);
    if (this.members.every(({ busy }) => !busy)) this.events?.idle();
  }

  private next(member: Member): void {
    if (member.busy || !this.queue.length) return;
    member.busy = true;
    const pairs = this.queue.splice(0, this.batch);
    this.batch = BATCH / this.rows;
    this.send(member, { kind: "make", pairs });
  }
}

async function hasGpu(): Promise<boolean> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<{ info?: { isFallbackAdapter?: boolean } } | null> } }).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter?.info?.isFallbackAdapter;
}
