#!/usr/bin/env node
// A ditfleet client with no packages: it speaks Redis' protocol over a socket and writes the few fields of a job by hand.
//
//   node ditfleet_client.js REDIS MODEL URL [FIELD=VALUE...]
//
// REDIS is HOST:PORT or the path of a Unix socket, FIELD one of FIELDS below. Events go to stderr, the outcome to stdout.
// proto/PROTOCOL.md is the contract. The record under the id counts only if it is ours; see "How to submit a job" there.
"use strict";
const net = require("node:net");
const { randomUUID } = require("node:crypto");

const FIELDS = { id: 1, model: 2, prompt: 3, width: 7, height: 8, num_inference_steps: 9, seed: 13 }; // of Job
const TEXT = ["id", "model", "prompt"];
const STATES = ["UNKNOWN", "QUEUED", "DELAYED", "LEASED", "RUNNING", "UPLOADING", "RETRY_WAIT", "SUCCEEDED", "DEAD",
  "CANCELLED", "EXPIRED"];

// ---- protobuf: a field is a key, number << 3 | type, and a varint (type 0) or a length and bytes (type 2)
function varint(n) {
  const bytes = [];
  for (n = BigInt(n); n > 127n; n >>= 7n) bytes.push(Number(n & 127n) | 128);
  return Buffer.from([...bytes, Number(n)]);
}
function bytesField(number, value) {
  const bytes = Buffer.from(value);
  return Buffer.concat([varint((number << 3) | 2), varint(bytes.length), bytes]);
}
function encodeJob(job, url) {
  const parts = Object.entries(job).map(([name, value]) => TEXT.includes(name)
    ? bytesField(FIELDS[name], value) : Buffer.concat([varint(FIELDS[name] << 3), varint(value)]));
  return Buffer.concat([...parts, bytesField(20, bytesField(1, url))]);
}
// {number: its values in order}; varints are numbers, messages and strings Buffers, the rest is skipped.
function decode(bytes) {
  const fields = {};
  let at = 0;
  const next = () => {
    let n = 0, scale = 1, byte;
    do { byte = bytes[at++]; n += (byte & 127) * scale; scale *= 128; } while (byte > 127);
    return n;
  };
  while (at < bytes.length) {
    const key = next(), type = key & 7, number = key >>> 3;
    const value = type === 0 ? next() : null;
    const length = type === 2 ? next() : type === 1 ? 8 : type === 5 ? 4 : 0;
    (fields[number] ??= []).push(value ?? bytes.subarray(at, at + length));
    at += length;
  }
  return fields;
}

// ---- Redis: [reply, where the next one begins], or undefined while bytes are missing
function parse(data, at) {
  const end = data.indexOf("\r\n", at);
  if (end < 0) return undefined;
  const kind = String.fromCharCode(data[at]), line = data.toString("latin1", at + 1, end), n = Number(line);
  at = end + 2;
  if (kind === "+") return [line, at];
  if (kind === "-") return [new Error(line), at];
  if (kind === ":") return [n, at];
  if (n < 0) return [null, at];
  if (kind === "$") return data.length < at + n + 2 ? undefined : [data.subarray(at, at + n), at + n + 2];
  const items = [];
  for (let i = 0; i < n; i++) {
    const item = parse(data, at);
    if (!item) return undefined;
    items.push(item[0]);
    at = item[1];
  }
  return [items, at];
}
class Redis {
  constructor(where) {
    const [, host, port] = where.match(/^([^/]*):(\d+)$/) ?? [];
    this.socket = net.connect(host ? { host, port: Number(port) } : { path: where });
    this.data = Buffer.alloc(0);
    this.socket.on("data", (more) => {
      this.data = Buffer.concat([this.data, more]);
      const reply = parse(this.data, 0);
      if (!reply) return;
      this.data = this.data.subarray(reply[1]);
      reply[0] instanceof Error ? this.reject(reply[0]) : this.resolve(reply[0]);
    });
    this.socket.on("error", (error) => this.reject(error));
    this.socket.on("close", () => this.reject(new Error("Redis closed the connection")));
  }
  command(...words) { // one at a time
    const parts = words.flatMap((word) => [`$${Buffer.byteLength(word)}\r\n`, word, "\r\n"]).map((p) => Buffer.from(p));
    return new Promise((resolve, reject) => {
      [this.resolve, this.reject] = [resolve, reject];
      this.socket.write(Buffer.concat([Buffer.from(`*${words.length}\r\n`), ...parts]));
    });
  }
}

// ---- the client
async function follow(redis, prefix, id, entry, onEvent) { // the Result's fields
  const events = `${prefix}ev:default:${id}`, receipt = `${prefix}ev:default:@${entry}`;
  let last = "0-0", known = false;
  for (;;) {
    let [owner, result] = await redis.command("HMGET", `${prefix}job:default:${id}`, "entry", "result");
    let ours = owner?.toString() === entry;
    if (!ours) {
      const [sameAs, refusal] = await redis.command("HMGET", `${prefix}job:default:@${entry}`, "same_as", "result");
      ours = sameAs !== null;
      if (!ours) result = refusal;
    }
    // Blocks for a second at most, so that the record is read again even if no event comes.
    const streams = ours ? [events, last] : known ? [receipt, "0-0"] : [events, receipt, "0-0", "0-0"];
    const news = await redis.command("XREAD", ...(result ? [] : ["BLOCK", "1000"]), "STREAMS", ...streams);
    known ||= news !== null; // the record is there by now; if it is not ours, only the receipt can tell more
    for (const [, entries] of ours && news ? news : [])
      for (const [at, [, event]] of entries) {
        last = at;
        onEvent(decode(event));
      }
    if (result) return decode(result);
  }
}
async function main([where, model, url, ...fields]) {
  const job = { id: randomUUID(), model };
  for (const [, name, value] of fields.map((field) => field.match(/^(\w+)=(.*)$/s) ?? [field, field])) {
    if (!(name in FIELDS) || value === undefined)
      throw new Error(`${name}: a field is NAME=VALUE, NAME one of ${Object.keys(FIELDS).join(" ")}`);
    job[name] = value;
  }
  const redis = new Redis(where), prefix = "dit:{default}:";
  const entry = (await redis.command("XADD", `${prefix}in:default`, "*", "job", encodeJob(job, url))).toString();
  const result = await follow(redis, prefix, job.id, entry, (e) =>
    console.error(`${STATES[e[2]?.[0] ?? 0]} ${e[3]?.[0] ?? ""} ${e[4]?.[0] ?? 0}/${e[5]?.[0] ?? 0}`));
  const state = STATES[result[2][0]], error = result[4] && decode(result[4][0]);
  console.log(state + (error ? ` ${error[1]}: ${error[2]}` : ` ${decode(result[3][0])[1]}`));
  redis.socket.destroy();
  return state === "SUCCEEDED" ? 0 : 1;
}
if (process.argv.length < 5) {
  console.error("usage: node ditfleet_client.js REDIS MODEL URL [FIELD=VALUE...]");
  process.exit(2);
}
main(process.argv.slice(2)).then((status) => { process.exitCode = status; }, (error) => {
  console.error(error.message);
  process.exit(1);
});
