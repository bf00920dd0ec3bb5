//! A hub: the parts of its API that `hf-hub` and our own requests use, with files behind a second host, as large files
//! lie behind the real one. Every answer can be made to go wrong.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit of every branch unless a test moves it.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Bytes that are written at once.
const BLOCK: usize = 64 << 10;

/// A file of the one repository.
#[derive(Clone)]
pub struct File {
    pub bytes: Arc<Vec<u8>>,
    /// Whether git has a pointer only, and the bytes are behind the second host.
    pub is_large: bool,
}

impl File {
    /// A large file of bytes that `seed` decides.
    pub fn large(len: usize, seed: u64) -> Self {
        Self { bytes: Arc::new(noise(len, seed)), is_large: true }
    }

    /// A small file.
    pub fn small(text: &str) -> Self {
        Self { bytes: Arc::new(text.into()), is_large: false }
    }

    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(&*self.bytes))
    }

    pub fn git_blob(&self) -> String {
        use sha1::Digest as _;
        let mut hash = Sha1::new_with_prefix(format!("blob {}\0", self.bytes.len()));
        hash.update(&*self.bytes);
        hex::encode(hash.finalize())
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Whether it was the second host that was asked.
    pub of_cdn: bool,
    pub method: String,
    /// With the query.
    pub path: String,
    /// The first byte that was asked for, and the one after the last.
    pub range: Option<(usize, usize)>,
    pub has_if_range: bool,
    pub authorization: Option<String>,
    /// Which request for bytes of this file it is, from 0.
    pub number: usize,
}

/// How a request for bytes is answered.
#[derive(Clone)]
pub enum Answer {
    /// As it should be.
    Right,
    /// With a status and one more header line.
    Status(&'static str, &'static str),
    /// The connection is cut after this many bytes.
    Cut(usize),
    /// As chunks, which end properly after this many bytes.
    ShortChunked(usize),
    /// This byte of the file is wrong.
    Flip(usize),
    /// After this many bytes nothing more comes, until the server is told to go on. Then it goes on.
    Pause(usize),
    /// Something else, with a status of 200.
    Page(&'static str),
    /// The whole file, whatever was asked for.
    Whole,
}

type Behaviour = Box<dyn Fn(&Asked) -> Answer + Send + Sync>;

struct Shared {
    commit: Mutex<String>,
    /// What the answers for bytes name as commit and hash, if they lie.
    named: Mutex<(Option<String>, Option<String>)>,
    files: Mutex<BTreeMap<String, File>>,
    behave: Mutex<Arc<Behaviour>>,
    refuse_names: Mutex<Option<&'static str>>,
    asked: Mutex<Vec<Asked>>,
    /// Bytes of files that were written.
    served: AtomicU64,
    numbers: Mutex<BTreeMap<String, usize>>,
    /// Told when an answer pauses.
    paused: (Mutex<Sender<()>>, Mutex<Receiver<()>>),
    gate: (Mutex<bool>, Condvar),
    hub_port: u16,
    cdn_port: u16,
}

/// The hub, until the process ends.
#[derive(Clone)]
pub struct HubServer(Arc<Shared>);

impl HubServer {
    /// Serves `files` of the repository `o/m`.
    pub fn start(files: &[(&str, File)]) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, cdn) = (listen(), listen());
        let (sender, receiver) = channel();
        let shared = Arc::new(Shared {
            commit: Mutex::new(COMMIT.into()),
            named: Mutex::default(),
            files: Mutex::new(files.iter().map(|(path, file)| (path.to_string(), file.clone())).collect()),
            behave: Mutex::new(Arc::new(Box::new(|_: &Asked| Answer::Right))),
            refuse_names: Mutex::default(),
            asked: Mutex::default(),
            served: AtomicU64::new(0),
            numbers: Mutex::default(),
            paused: (Mutex::new(sender), Mutex::new(receiver)),
            gate: (Mutex::new(false), Condvar::new()),
            hub_port: hub.local_addr().unwrap().port(),
            cdn_port: cdn.local_addr().unwrap().port(),
        });
        for (listener, of_cdn) in [(hub, false), (cdn, true)] {
            let shared = shared.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = shared.clone();
                    thread::spawn(move || serve(&shared, stream, of_cdn));
                }
            });
        }
        Self(shared)
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.0.hub_port)
    }

    /// From now on requests for bytes are answered so.
    pub fn behave(&self, behave: impl Fn(&Asked) -> Answer + Send + Sync + 'static) {
        *self.0.behave.lock().unwrap() = Arc::new(Box::new(behave));
    }

    /// From now on questions about names are refused with this status.
    pub fn refuse_names(&self, status: Option<&'static str>) {
        *self.0.refuse_names.lock().unwrap() = status;
    }

    /// The branch is at another commit now.
    pub fn move_branch(&self, commit: &str) {
        *self.0.commit.lock().unwrap() = commit.into();
    }

    /// Answers for bytes name another commit, or hash, than they should.
    pub fn lie(&self, commit: Option<&str>, hash: Option<&str>) {
        *self.0.named.lock().unwrap() = (commit.map(str::to_string), hash.map(str::to_string));
    }

    pub fn put(&self, path: &str, file: File) {
        self.0.files.lock().unwrap().insert(path.into(), file);
    }

    /// Waits until an answer has paused.
    pub fn wait_for_pause(&self) {
        let paused = self.0.paused.1.lock().unwrap();
        paused.recv_timeout(Duration::from_secs(60)).expect("an answer pauses");
    }

    /// Lets answers that have paused go on, and those that would pause.
    pub fn go_on(&self) {
        *self.0.gate.0.lock().unwrap() = true;
        self.0.gate.1.notify_all();
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.0.asked.lock().unwrap().clone()
    }

    /// Bytes of files that were written.
    pub fn served(&self) -> u64 {
        self.0.served.load(Ordering::SeqCst)
    }

    /// Whether an answer pauses before `child` ends.
    pub fn pauses_before_the_end_of(&self, child: &mut Child) -> bool {
        let paused = self.0.paused.1.lock().unwrap();
        loop {
            match paused.recv_timeout(Duration::from_millis(20)) {
                Ok(()) => return true,
                Err(_) if child.try_wait().unwrap().is_some() => return false,
                Err(_) => {}
            }
        }
    }

    /// Answers may pause again.
    pub fn rearm(&self) {
        self.0.numbers.lock().unwrap().clear();
        let paused = self.0.paused.1.lock().unwrap();
        while paused.try_recv().is_ok() {}
        *self.0.gate.0.lock().unwrap() = false;
    }

    /// Forgets what was asked and served.
    pub fn forget(&self) {
        self.0.asked.lock().unwrap().clear();
        self.0.served.store(0, Ordering::SeqCst);
        self.rearm();
    }
}

struct Head {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

fn read_head(reader: &mut impl BufRead) -> Option<Head> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut words = line.split_whitespace().map(str::to_string);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_string()),
            None => break,
        };
    }
    let len = headers.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    reader.read_exact(&mut body).ok()?;
    Some(Head { method, path, headers, body })
}

/// Makes a connection one of a network, slower than memory: next to nothing of what counts as served lies in the buffers
/// of the system, where a killed client has not read it.
fn pace(stream: &TcpStream) {
    const BYTES_PER_S: libc::c_uint = 64 << 20;
    const BUFFER_BYTES: libc::c_uint = 128 << 10;
    for (option, value) in [(libc::SO_SNDBUF, BUFFER_BYTES), (libc::SO_MAX_PACING_RATE, BYTES_PER_S)] {
        let (pointer, len) = ((&raw const value).cast(), size_of_val(&value) as libc::socklen_t);
        // SAFETY: the pointer is to a value of this length, and the socket is open.
        let set = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, option, pointer, len) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
}

fn serve(shared: &Shared, stream: TcpStream, of_cdn: bool) {
    pace(&stream);
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    // A client that hangs up has its reasons.
    while let Some(head) = read_head(&mut reader) {
        if answer(shared, &head, &mut stream, of_cdn).is_none() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

/// `None` when the connection cannot be used any more.
fn answer(shared: &Shared, head: &Head, stream: &mut TcpStream, of_cdn: bool) -> Option<()> {
    let path = head.path.split('?').next().unwrap_or_default();
    let range = head.headers.get("range").and_then(|range| {
        let (from, until) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((from.parse().ok()?, until.parse::<usize>().ok()? + 1))
    });
    let mut asked = Asked {
        of_cdn,
        method: head.method.clone(),
        path: head.path.clone(),
        range,
        has_if_range: head.headers.contains_key("if-range"),
        authorization: head.headers.get("authorization").cloned(),
        number: 0,
    };
    let is_for_bytes = head.method == "GET" && (of_cdn || path.contains("/resolve/"));
    let files = shared.files.lock().unwrap().clone();
    if let (false, Some(rest)) = (of_cdn, path.strip_prefix("/api/models/o/m/")) {
        shared.asked.lock().unwrap().push(asked);
        if let Some(status) = *shared.refuse_names.lock().unwrap() {
            return plain(stream, status, "", b"{\"error\": \"refused\"}");
        }
        return names(shared, rest, &head.body, &files, stream);
    }
    let name = match of_cdn {
        true => path.strip_prefix("/blob/").map(str::to_string),
        false => {
            path.strip_prefix("/o/m/resolve/").and_then(|rest| Some(rest.split_once('/')?.1.to_string()))
        }
    };
    let Some((name, file)) = name.and_then(|name| Some((name.clone(), files.get(&name)?.clone()))) else {
        shared.asked.lock().unwrap().push(asked);
        return plain(stream, "404 Not Found", "", b"Not Found");
    };
    let (named_commit, named_hash) = shared.named.lock().unwrap().clone();
    let revision = path.split('/').nth(4).unwrap_or_default();
    let commit = named_commit.unwrap_or_else(|| revision.to_string());
    let etag = named_hash.unwrap_or_else(|| if file.is_large { file.sha256() } else { file.git_blob() });
    if !of_cdn && file.is_large {
        shared.asked.lock().unwrap().push(asked);
        let (port, len) = (shared.cdn_port, file.bytes.len());
        let headers = format!(
            "Location: http://localhost:{port}/blob/{name}?signature=canary-signature\r\nX-Repo-Commit: {commit}\r\n\
             X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {len}\r\n"
        );
        return plain(stream, "302 Found", &headers, b"");
    }
    if is_for_bytes {
        let mut numbers = shared.numbers.lock().unwrap();
        let next = numbers.entry(name).or_default();
        asked.number = *next;
        *next += 1;
    }
    shared.asked.lock().unwrap().push(asked.clone());
    let behave = shared.behave.lock().unwrap().clone();
    let answer = behave(&asked);
    // Behind the second host a file has a tag of its own.
    let etag = if of_cdn { "\"cdn-1\"".to_string() } else { format!("\"{etag}\"") };
    let headers = format!("ETag: {etag}\r\nX-Repo-Commit: {commit}\r\nAccept-Ranges: bytes\r\n");
    let headers = if of_cdn { "ETag: \"cdn-1\"\r\nAccept-Ranges: bytes\r\n".to_string() } else { headers };
    send(shared, stream, &file, &asked, (&headers, answer))
}

/// Questions about branches and files.
fn names(
    shared: &Shared,
    rest: &str,
    body: &[u8],
    files: &BTreeMap<String, File>,
    stream: &mut TcpStream,
) -> Option<()> {
    let reply = if rest.starts_with("revision/") {
        let commit = shared.commit.lock().unwrap().clone();
        json!({"_id": "x", "id": "o/m", "modelId": "o/m", "sha": commit, "private": false, "tags": []})
    } else {
        let wanted: Value = serde_json::from_slice(body).unwrap_or_default();
        let wanted = wanted["paths"].as_array().cloned().unwrap_or_default();
        let entries = wanted.iter().filter_map(|path| {
            let (path, file) = files.get_key_value(path.as_str()?)?;
            let mut entry = json!({
                "type": "file", "oid": file.git_blob(), "size": file.bytes.len(), "path": path,
            });
            if file.is_large {
                entry["oid"] = "f".repeat(40).into();
                entry["lfs"] = json!({"oid": file.sha256(), "size": file.bytes.len(), "pointerSize": 134});
            }
            Some(entry)
        });
        entries.collect()
    };
    plain(stream, "200 OK", "Content-Type: application/json\r\n", reply.to_string().as_bytes())
}

fn plain(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> Option<()> {
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), body].concat()).ok()
}

fn send(
    shared: &Shared,
    stream: &mut TcpStream,
    file: &File,
    asked: &Asked,
    (headers, answer): (&str, Answer),
) -> Option<()> {
    let len = file.bytes.len();
    let (from, until) = match (asked.range, &answer) {
        (Some((from, until)), answer) if !matches!(answer, Answer::Whole) => (from.min(len), until.min(len)),
        _ => (0, len),
    };
    let is_part = asked.range.is_some() && !matches!(answer, Answer::Whole);
    let mut bytes = file.bytes[from..until].to_vec();
    match &answer {
        Answer::Status(status, header) => return plain(stream, status, header, b"busy"),
        Answer::Page(text) => return plain(stream, "200 OK", "Content-Type: text/html\r\n", text.as_bytes()),
        Answer::Flip(at) if (from..until).contains(at) => bytes[at - from] ^= 0xff,
        _ => {}
    }
    let chunked = matches!(answer, Answer::ShortChunked(_));
    let mut head = match is_part {
        true => {
            format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{len}\r\n", until - 1)
        }
        false => "HTTP/1.1 200 OK\r\n".to_string(),
    };
    head += headers;
    head += &match chunked {
        true => "Transfer-Encoding: chunked\r\n\r\n".to_string(),
        false => format!("Content-Length: {}\r\n\r\n", bytes.len()),
    };
    stream.write_all(head.as_bytes()).ok()?;
    if asked.method == "HEAD" {
        return Some(());
    }
    let stop = match &answer {
        Answer::Cut(n) | Answer::ShortChunked(n) | Answer::Pause(n) => (*n).min(bytes.len()),
        _ => bytes.len(),
    };
    write(shared, stream, &bytes[..stop], chunked)?;
    match answer {
        Answer::Cut(_) if stop < bytes.len() => None,
        Answer::ShortChunked(_) => stream.write_all(b"0\r\n\r\n").ok(),
        Answer::Pause(_) => {
            shared.paused.0.lock().unwrap().send(()).ok()?;
            let mut gate = shared.gate.0.lock().unwrap();
            while !*gate {
                gate = shared.gate.1.wait(gate).unwrap();
            }
            drop(gate);
            write(shared, stream, &bytes[stop..], chunked)
        }
        _ => Some(()),
    }
}

fn write(shared: &Shared, stream: &mut TcpStream, bytes: &[u8], chunked: bool) -> Option<()> {
    for block in bytes.chunks(BLOCK) {
        if chunked {
            stream.write_all(format!("{:x}\r\n", block.len()).as_bytes()).ok()?;
        }
        stream.write_all(block).ok()?;
        if chunked {
            stream.write_all(b"\r\n").ok()?;
        }
        shared.served.fetch_add(block.len() as u64, Ordering::SeqCst);
    }
    Some(())
}
