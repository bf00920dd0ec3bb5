// Sends a job, follows it, plays its video, by the API that every other client uses.

const $ = (id) => document.getElementById(id);
const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
const MB = 1e6;
// What the gateway takes, in bytes.
const { imageBytes, audioBytes, requestBytes } = document.body.dataset;
const LIMITS = { image: Number(imageBytes), audio: Number(audioBytes), request: Number(requestBytes) };
const FINAL = ['COMPLETED', 'FAILED', 'CANCELLED', 'TIMED_OUT'];
const STATES = {
  IN_QUEUE: 'Waiting', IN_PROGRESS: 'Being made', COMPLETED: 'Ready',
  FAILED: 'Failed', CANCELLED: 'Cancelled', TIMED_OUT: 'Took too long',
};
const STAGES = {
  queued: 'Waiting', fetch: 'Fetching portrait and voice', validate: 'Checking portrait and voice',
  load: 'Loading the model', audio: 'Listening to the voice', denoise: 'Drawing the video',
  decode: 'Developing the pictures', upload: 'Storing the video', done: 'Done',
};
const RETRY_MS = 2000;

// ---- The gateway ----

class Refusal extends Error {
  constructor(status, { code, message, hint } = {}) {
    super(message || `The gateway answered ${status}.`);
    Object.assign(this, { status, code, hint });
  }
}

/** Calls the gateway. An answer that is an error is thrown as a Refusal; 401 also asks for the key. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem('key');
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const body = await response.json().catch(() => ({}));
  throw new Refusal(response.status, typeof body.error === 'string' ? { message: body.error } : body.error);
}

const read = (path, options) => call(path, options).then((response) => response.json());

function askForKey() {
  if ($('key-form').hidden) {
    $('key-form').hidden = false;
    $('key').focus();
  }
}

$('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  sessionStorage.setItem('key', $('key').value.trim());
  $('key').value = '';
  $('key-form').hidden = true;
  $('form-error').hidden = true;
  listRecent();
  follow();
});

/** Yields the events of a job as [name, data] until the gateway ends them. */
async function* events(id, signal) {
  const response = await call(`events/${encodeURIComponent(id)}`, { signal, headers: { Accept: 'text/event-stream' } });
  let text = '';
  for await (const chunk of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    text += chunk;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split(/\r?\n/)) {
        const [, name, value] = /^(event|data): ?(.*)$/.exec(line) ?? [];
        if (name) fields[name] = name in fields ? `${fields[name]}\n${value}` : value;
      }
      if (fields.data) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

// Safari cannot loop over a stream itself.
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (let part; !(part = await reader.read()).done;) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- What is remembered here: the names of this browser's jobs ----

function remembered() {
  try {
    return JSON.parse(localStorage.getItem('jobs')) ?? [];
  } catch {
    return [];
  }
}

function remember(job) {
  localStorage.setItem('jobs', JSON.stringify([job, ...remembered()].slice(0, 50)));
}

function forget(gone) {
  if (!gone.length) return;
  localStorage.setItem('jobs', JSON.stringify(remembered().filter(({ id }) => !gone.some((job) => job.id === id))));
}

// ---- A new video ----

const files = {};

function choose(kind, file) {
  const drop = document.querySelector(`[data-kind=${kind}]`);
  const preview = drop.querySelector('img, audio');
  if (preview.src) URL.revokeObjectURL(preview.src);
  files[kind] = file;
  drop.classList.toggle('filled', !!file);
  preview.hidden = !file;
  if (!file) return;
  preview.src = URL.createObjectURL(file);
  drop.querySelector('.name').textContent = `${file.name} · ${size(file.size)}`;
  complain(sizeError());
}

for (const drop of document.querySelectorAll('.drop')) {
  const { kind } = drop.dataset;
  const input = drop.querySelector('input');
  // The browser has kept neither preview nor name over a reload.
  input.value = '';
  input.addEventListener('change', () => input.files[0] && choose(kind, input.files[0]));
  for (const name of ['dragenter', 'dragover', 'dragleave', 'drop']) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle('over', name === 'dragenter' || name === 'dragover');
      if (name === 'drop' && event.dataTransfer.files[0]) choose(kind, event.dataTransfer.files[0]);
    });
  }
}
// A file that misses its place must not replace the page.
for (const name of ['dragover', 'drop']) addEventListener(name, (event) => event.preventDefault());

const size = (bytes) => (bytes < MB ? `${Math.ceil(bytes / 1000)} kB` : `${(bytes / MB).toFixed(1)} MB`);

for (const kind of ['image', 'audio']) $(`${kind}-note`).append(`, up to ${size(LIMITS[kind])}`);

function sizeError() {
  const { image, audio } = files;
  for (const [what, file] of Object.entries({ portrait: image, voice: audio })) {
    const limit = LIMITS[what === 'voice' ? 'audio' : 'image'];
    if (file?.size === 0) return `The ${what} is empty. Choose another file.`;
    if (file?.size > limit) return `The ${what} has ${size(file.size)}; up to ${size(limit)} can be used.`;
  }
  // Base64 makes three bytes four; the rest is for the prompt.
  const room = LIMITS.request - 20_000;
  const sum = (image?.size ?? 0) + (audio?.size ?? 0);
  if (sum * 4 / 3 > room) {
    return `Portrait and voice have ${size(sum)} together; this page can send up to ${size(room * 3 / 4)}. `
      + 'Save the voice as MP3 or M4A, or the portrait as JPEG.';
  }
}

function complain(message) {
  $('form-error').textContent = message ?? '';
  $('form-error').hidden = !message;
  if (message) $('form-error').scrollIntoView({ block: 'nearest' });
}

const dataUri = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
  reader.readAsDataURL(file);
});

$('job-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  for (const [kind, wish] of [['image', 'Choose a portrait first.'], ['audio', 'Choose a voice first.']]) {
    if (!files[kind]) {
      complain(wish);
      return $(kind).focus();
    }
  }
  const wrong = sizeError() ?? ($('seed').validity.valid ? null : 'The seed is a whole number.');
  complain(wrong);
  if (wrong) return;
  const button = $('submit');
  button.disabled = true;
  button.textContent = 'Sending…';
  try {
    const input = { image: await dataUri(files.image), audio: await dataUri(files.audio) };
    for (const field of ['prompt', 'preset', 'size']) if ($(field).value.trim()) input[field] = $(field).value.trim();
    if ($('seed').value) input.seed = Number($('seed').value);
    const { id } = await read('run', {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ input }),
    });
    remember({ id, name: `${stem(files.image)} · ${stem(files.audio)}` });
    location.hash = id;
    listRecent();
  } catch (error) {
    complain(inWords(error));
  } finally {
    button.disabled = false;
    button.textContent = 'Make the video';
  }
});

const stem = (file) => file.name.replace(/\.\w+$/, '');

function inWords(error) {
  if (error.status === 401) return 'The gateway asks for an API key: enter it above, then try again.';
  if (error instanceof TypeError) return 'The gateway cannot be reached. Is it running?';
  return [error.message, error.hint, error.code && `(${error.code})`].filter(Boolean).join(' ');
}

// ---- One job ----

let shown = new AbortController();

/** Follows the job that the address names, until it is final or another one is named. */
async function follow() {
  shown.abort();
  const { signal } = (shown = new AbortController());
  const id = decodeURIComponent(location.hash.slice(1));
  $('job').hidden = !id;
  $('job-form').hidden = !!id;
  markCurrent();
  if (!id) return;
  $('job-title').textContent = nameOf(id);
  $('job-id').textContent = id;
  for (const part of ['job-error', 'video', 'download', 'cancel']) $(part).hidden = true;
  $('video').removeAttribute('src');
  $('job-detail').textContent = $('job-notes').textContent = $('job-state').textContent = '';
  $('bar').hidden = false;
  $('bar').removeAttribute('value');
  $('job').focus({ preventScroll: true });
  scrollTo({ top: 0 });

  while (!signal.aborted) {
    try {
      for await (const [name, data] of events(id, signal)) {
        if (name === 'progress') showProgress(data);
        if (name === 'status' && showStatus(data)) return;
      }
    } catch { /* What is wrong shows below. */ }
    try {
      // The events ended early, or cannot be had: ask.
      if (!signal.aborted && showStatus(await read(`status/${encodeURIComponent(id)}`, { signal }))) return;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refusal && error.status < 500 && error.status !== 429) return showLost(error);
      say('The connection is lost; trying again…');
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

/** Shows where the job is; true when it will not change any more. */
function showStatus(job) {
  const over = FINAL.includes(job.status);
  const listed = $('jobs').querySelector('[aria-current] .state');
  if (listed) Object.assign(listed, stateOf(job.status));
  $('cancel').hidden = $('bar').hidden = over;
  if (job.status === 'IN_QUEUE') {
    $('bar').removeAttribute('value');
    $('job-detail').textContent = job.reason ?? '';
    say(job.position > 0 ? `Waiting: ${job.position} before it` : 'Next in line');
  } else if (job.status === 'IN_PROGRESS') {
    if (job.output?.stage) showProgress(job.output);
    else if (!$('bar').hasAttribute('value')) say('Starting');
  } else {
    $('job-detail').textContent = '';
    say(STATES[job.status] ?? job.status);
    if (job.status === 'COMPLETED') showVideo(job.output);
    if (job.error) showError(job.error);
  }
  return over;
}

function showProgress({ stage, percent, message, eta_s: eta }) {
  say(STAGES[stage] ?? stage ?? 'Being made');
  if (Number.isFinite(percent)) $('bar').value = percent;
  const left = Number.isFinite(eta) && `about ${duration(eta)} left`;
  const percentage = Number.isFinite(percent) && `${percent} %`;
  $('job-detail').textContent = [percentage, message !== stage && message, left].filter(Boolean).join(' · ');
}

function showVideo(output) {
  if (!output?.video_url) {
    $('job-notes').textContent = JSON.stringify(output);
    return;
  }
  $('video').src = $('download').href = output.video_url;
  $('download').download = `${nameOf($('job-id').textContent).replace(/\W+/g, '-')}.mp4`;
  $('video').hidden = $('download').hidden = false;
  const facts = [
    output.duration_s && `${output.duration_s.toFixed(1)} s`,
    output.width && `${output.width} × ${output.height}`,
    output.size_bytes && size(output.size_bytes),
    Number.isFinite(output.seed) && `seed ${output.seed}`,
    output.timings && `made in ${duration(output.timings.total_ms / 1000)}`,
  ].filter(Boolean).join(' · ');
  $('job-notes').textContent = [facts, ...(output.warnings ?? []), ...(output.downgrades ?? [])].join('. ');
}

$('video').addEventListener('error', () => {
  if ($('video').hasAttribute('src')) {
    showError(JSON.stringify({ message: 'The video cannot be played here.', hint: 'Its link may have expired.' }));
  }
});

/** Our errors are texts that hold JSON; those of foreign workers any text. */
function showError(text) {
  let error = { message: text };
  try {
    const fields = JSON.parse(text);
    error = { message: fields.message ?? fields.error_message ?? text, hint: fields.hint, code: fields.code };
  } catch { /* Plain words. */ }
  const lines = [error.message, error.hint, error.code && `\`${error.code}\``].filter(Boolean);
  $('job-error').replaceChildren(...lines.map((line) => {
    const p = element('p');
    p.append(...line.split('`').map((part, i) => (i % 2 ? element('code', { textContent: part }) : part)));
    return p;
  }));
  $('job-error').hidden = false;
}

function showLost(error) {
  $('bar').hidden = $('cancel').hidden = true;
  say(error.status === 404 ? 'This job is not known any more' : '');
  if (error.status !== 404) {
    const { message, hint, code } = error;
    showError(JSON.stringify(error.status === 401 ? { message: inWords(error) } : { message, hint, code }));
  }
}

/** Says it once: a screen reader would repeat it with every report. */
function say(text) {
  if ($('job-state').textContent !== text) $('job-state').textContent = text;
}

function duration(seconds) {
  const s = Math.ceil(seconds);
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)} min ${s % 60} s`;
}

$('cancel').addEventListener('click', async () => {
  $('cancel').disabled = true;
  try {
    const id = $('job-id').textContent;
    const job = await read(`cancel/${encodeURIComponent(id)}`, { method: 'POST' });
    if (id === $('job-id').textContent) showStatus(job);
  } catch (error) {
    showError(JSON.stringify({ message: inWords(error) }));
  } finally {
    $('cancel').disabled = false;
  }
});

$('again').addEventListener('click', () => {
  history.pushState(null, '', location.pathname + location.search);
  follow();
  $('image').focus();
});

// ---- Recent jobs ----

const stateOf = (status) => ({ className: `state ${status}`, textContent: STATES[status] ?? status });
const nameOf = (id) => remembered().find((job) => job.id === id)?.name ?? 'Video';

async function listRecent() {
  let jobs;
  try {
    jobs = (await read('requests?limit=30')).requests;
    // On a busy gateway the jobs of this browser may be too far down.
    const further = remembered().filter(({ id }) => !jobs.some((job) => job.id === id)).slice(0, 10);
    const found = await Promise.allSettled(further.map(({ id }) => read(`status/${encodeURIComponent(id)}`)));
    forget(further.filter((_, i) => found[i].reason?.status === 404));
    jobs.push(...found.filter(({ value }) => value).map(({ value }) => value));
  } catch {
    return;
  }
  $('recent').hidden = !jobs.length;
  $('jobs').replaceChildren(...jobs.map(({ id, status, createdAt }) => {
    const link = element('a', { href: `#${encodeURIComponent(id)}` });
    const time = element('time');
    if (createdAt) {
      time.dateTime = new Date(createdAt).toISOString();
      time.textContent = new Date(createdAt).toLocaleString([], { dateStyle: 'medium', timeStyle: 'short' });
    }
    const name = element('span', { className: 'name', textContent: nameOf(id) });
    link.append(name, time, element('span', stateOf(status)));
    const item = element('li');
    item.append(link);
    return item;
  }));
  markCurrent();
}

function markCurrent() {
  for (const link of $('jobs').querySelectorAll('a')) {
    if (link.hash === location.hash && location.hash) link.setAttribute('aria-current', 'true');
    else link.removeAttribute('aria-current');
  }
}

addEventListener('hashchange', follow);
document.addEventListener('visibilitychange', () => document.hidden || listRecent());
listRecent();
follow();
