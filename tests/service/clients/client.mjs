// Uses a gateway through RunPod's JavaScript client, as its users do, and prints what came of each step as a JSON line.
//
//     node client.mjs SDK BASE_URL KEY < jobs.json
//
// SDK is the module's file. `jobs.json` holds the inputs `quick`, whose video is made at once, and `waits`, which runs
// until it is cancelled. Every line is {"step", "value"} or {"step", "error"}.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [sdk, baseUrl, key] = process.argv.slice(2);
const jobs = JSON.parse(readFileSync(0, 'utf8'));
// The client reports to standard output, which is ours.
console.log = () => {};
const { default: runpodSdk } = await import(pathToFileURL(sdk));
const endpointWith = (apiKey) => runpodSdk(apiKey, { baseUrl }).endpoint('talkie');

/** Awaits `action` and prints what it returned or threw; returns it too. */
async function step(name, action) {
  const print = (line) => process.stdout.write(`${JSON.stringify({ step: name, ...line })}\n`);
  try {
    const value = await action();
    print({ value });
    return value;
  } catch (error) {
    print({ error: error.message });
  }
}

/** What lies behind the link of an output, beside what the output says of it. */
async function video(output) {
  const response = await fetch(output.video_url);
  const content = Buffer.from(await response.arrayBuffer());
  return {
    type: response.headers.get('content-type'), brand: content.subarray(4, 8).toString(),
    size: [content.length, output.size_bytes],
    sha256: [createHash('sha256').update(content).digest('hex'), output.sha256],
  };
}

async function untilRunning(id) {
  let job;
  do job = await endpoint.status(id); while (job.status === 'IN_QUEUE');
  return job.status;
}

const endpoint = endpointWith(key);
await step('health', () => endpoint.health());

const { id } = await endpoint.run({ input: jobs.quick });
await step('status', async () => (await endpoint.status(id)).status);
const ended = await endpoint.statusSync(id);
await step('statusSync', async () => ended.status);
await step('video', () => video(ended.output));
await step('runSync', async () => video((await endpoint.runSync({ input: jobs.quick })).output));
const streamed = await endpoint.run({ input: jobs.quick });
await step('stream', async () => {
  const chunks = [];
  for await (const chunk of endpoint.stream(streamed.id)) chunks.push(chunk);
  return chunks;
});

const waits = await endpoint.run({ input: jobs.waits });
await step('running', () => untilRunning(waits.id));
await step('timeout', async () => (await endpoint.runSync({ input: jobs.waits }, 1000)).completed);
await step('purgeQueue', () => endpoint.purgeQueue());
await step('cancel', async () => (await endpoint.cancel(waits.id)).status);
await step('cancelled', async () => (await endpoint.status(waits.id)).status);

await step('unknown job', () => endpoint.status('no-such-job'));
await step('empty input', () => endpoint.run({ input: {} }));
await step('bad key', () => endpointWith('not-a-key').health());
