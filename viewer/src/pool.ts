/** Workers that make the images of one pack; the page stays responsive, and needs no shared memory. */

import type { Pair } from "./rebuild.ts";
import type { Reply, Request } from "./worker.ts";

const MOST_WORKERS = 4;
const FIRST = 1; // images of the first batch, so that one is seen soon
const BATCH = 8; // rows of later ones: more hardly make a pass faster, and one waits longer for them

export interface Events {
  made(pair: Pair, image: Uint8Array): void;
  idle(): void;
  failed(message: string): void;
}

interface Member {
  worker: Worker;
  pending: number; // requests that are not answered
}

export class Pool {
  private readonly members: Member[] = [];
  private readonly queue: Pair[] = [];
  private batch = FIRST;
  private current = 0; // the number of the pack; answers for an earlier one are dropped
  private events: Events | undefined;
  private gpu: Promise<boolean> | undefined;
  private pack: Uint8Array = new Uint8Array();
  private rows = 1; // of the denoiser for an image: two with guidance

  /** Load the networks before there is a pack. */
  async warm(): Promise<void> {
    const gpu = await (this.gpu ??= hasGpu());
    if (!this.members.length) this.send(this.start(), { kind: "load", gpu });
  }

  /** Take another pack; what was queued for the one before is dropped. */
  async open(pack: Uint8Array, rows: number, events: Events): Promise<void> {
    this.close();
    const mine = this.current;
    await this.warm();
    if (mine !== this.current) return; // another pack was opened meanwhile
    [this.pack, this.rows, this.events] = [pack, rows, events];
    for (const member of this.members) this.give(member);
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

  /** Forget the pack; the networks stay. */
  close(): void {
    this.stop();
    this.current += 1;
    [this.events, this.batch] = [undefined, FIRST];
  }

  get waiting(): number {
    return this.queue.length;
  }

  private start(): Member {
    const worker = new Worker(new URL("worker.js", document.baseURI), { type: "module" });
    const member = { worker, pending: 0 };
    this.members.push(member);
    worker.onmessage = ({ data }: MessageEvent<Reply>) => this.answer(member, data);
    worker.onerror = (event) => this.events?.failed(event.message || "a worker could not be started");
    return member;
  }

  private send(member: Member, request: Request): void {
    member.pending += 1;
    member.worker.postMessage(request);
  }

  private give(member: Member): void {
    this.send(member, { kind: "open", id: this.current, pack: this.pack });
  }

  private async answer(member: Member, reply: Reply): Promise<void> {
    member.pending -= 1;
    if (reply.kind === "failed") {
      this.stop();
      this.events?.failed(reply.message);
      return;
    }
    if (reply.kind === "made" && reply.id === this.current) {
      reply.pairs.forEach((pair, i) => this.events?.made(pair, reply.images[i]));
      await this.grow();
    }
    this.next(member);
    if (this.members.every(({ pending }) => !pending)) this.events?.idle();
  }

  /** Start one more worker, once the first has shown an image: loading takes processor time. */
  private async grow(): Promise<void> {
    const gpu = await this.gpu;
    const most = gpu ? 1 : Math.min(navigator.hardwareConcurrency || 1, MOST_WORKERS);
    if (!gpu && this.members.length < most && this.queue.length) {
      const member = this.start();
      this.send(member, { kind: "load", gpu: false });
      this.give(member);
    }
  }

  private next(member: Member): void {
    if (member.pending || !this.queue.length) return;
    const pairs = this.queue.splice(0, this.batch);
    this.batch = BATCH / this.rows;
    this.send(member, { kind: "make", id: this.current, pairs });
  }
}

async function hasGpu(): Promise<boolean> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<{ info?: { isFallbackAdapter?: boolean } } | null> } }).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter?.info?.isFallbackAdapter;
}
