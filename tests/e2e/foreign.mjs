// An agent called "node", written from the contract alone: it publishes every event, beats, sends, receives.
import { randomUUID } from "node:crypto";
import { decode, encode } from "@msgpack/msgpack";
import { createClient, RESP_TYPES } from "redis";

const client = createClient({ url: process.env.REDIS_URL });
await client.connect();
const asBytes = { typeMapping: { [RESP_TYPES.BLOB_STRING]: Buffer } };
const at = Date.now() / 1000;
const publish = (stream, type, body) => client.xAdd(stream, "*", { type, body: Buffer.from(encode(body)) });

const incarnation = randomUUID();
let beats = 0;
const beat = () => publish("em:heartbeats", "heartbeat", { agent: "node", incarnation, seq: beats++, status: "ok", pid: process.pid });
await beat();
const heart = setInterval(beat, 200);

const content = Buffer.from([0x7b, 0x7d, 0xff]);
await publish("em:agent-state", "agent.state", { agent: "z", state: "ALIVE" });
await publish("em:agent-state", "agent.state", { agent: "z", state: "DEGRADED", reason: "slow", at, incarnation, note: "unknown key" });
await publish("em:agent-state", "agent.state", { agent: "z", state: "DEAD", reason: "no answer", at: Math.floor(at) });
const change = (id) => ({ change: id, agent: "z", paths: ["weights.json"], by: "node", reason: "better", at });
await publish("em:config-change", "config.proposed", { ...change("c1"), proposed: { "weights.json": content } });
await publish("em:config-change", "config.approved", { change: "c1", by: "kari", at, signature: "signed" });
await publish("em:config-change", "config.applied", { ...change("c1"), approved_by: "kari" });
await publish("em:config-change", "config.proposed", change("c2"));
await publish("em:config-change", "config.rejected", { change: "c2", by: "kari", reason: "too bold" });
for (const seq of [1, 2, 3]) {
  await publish("em:messages", "message", { from: "node", to: "jay", seq, payload: Buffer.from(`hello ${seq}`), at });
}

try {
  await client.xGroupCreate("em:inbox:node", "agent", "0", { MKSTREAM: true });
} catch (error) {
  if (!error.message.includes("BUSYGROUP")) throw error;
}
const got = [];
for (const until = Date.now() + 20_000; got.length < 3 && Date.now() < until; ) {
  const answer = await client.sendCommand(
    ["XREADGROUP", "GROUP", "agent", "node", "BLOCK", "500", "STREAMS", "em:inbox:node", ">"],
    asBytes,
  );
  for (const [id, fields] of answer?.[0]?.[1] ?? []) {
    const message = decode(fields[fields.findIndex((name, i) => i % 2 === 0 && name.toString() === "body") + 1]);
    got.push({ from: message.from, seq: message.seq, text: Buffer.from(message.payload).toString(), log: message.log });
    await client.xAck("em:inbox:node", "agent", id.toString());
  }
}
process.stdout.write(JSON.stringify({ got, beats }) + "\n");
clearInterval(heart);
await client.close();
