//! Runs the binary, and serves it HTTP.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::media;

/// The binary, in an environment that holds nothing of ours.
pub fn handler() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handler"));
    command.env_clear().env("HOME", "/nonexistent").stdin(Stdio::null());
    command
}

/// Whether the loops run in full, as in `scripts/crash-suite.sh`.
pub fn is_long() -> bool {
    std::env::var_os("TALKIE_LONG").is_some_and(|set| set == "1")
}

/// What RLIMIT_FSIZE lets a file have: a full disk, for one process.
pub fn with_small_files(command: &mut Command, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: both calls are safe between fork and exec, and get no pointer but one to a live `rlimit`. Ignored,
    // the signal becomes the error EFBIG.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            match libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
}

/// The settings of the quickest video: the model `tiny`, one step, windows of 17 frames.
pub fn tiny_args() -> [&'static str; 8] {
    ["--model", "tiny", "--steps", "1", "--frames-per-window", "17", "--motion-frames", "5"]
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("standard output is text"),
            stderr: String::from_utf8(output.stderr).expect("standard error is text"),
        }
    }

    /// The output JSON of a run that succeeded.
    pub fn output(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }

    /// The error JSON of a run that failed: the last line of standard error.
    pub fn error(&self) -> Value {
        assert_eq!(self.stdout, "", "a failed run prints no output");
        let last = self.stderr.lines().last().unwrap_or_default();
        let error: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}", self.stderr));
        for field in ["code", "message", "hint", "retryable", "details"] {
            assert!(error.get(field).is_some(), "`{field}` is missing: {error}");
        }
        error
    }

    /// Checks that the run was refused as bad input of `code`.
    #[track_caller]
    pub fn refused(&self, code: &str) -> Value {
        let error = self.error();
        assert_eq!((self.code, error["code"].as_str()), (Some(2), Some(code)), "{}", self.stderr);
        error
    }
}

/// A folder with a sound portrait and a sound voice, in which videos are made.
pub struct Bench {
    pub dir: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        bench.write("portrait.png", &media::png(96, 96));
        bench.write("voice.wav", &media::tone(16_000, 1, 0.5));
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// What lies in the folder, hidden files too.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// `handler generate` in this folder, with the quickest settings and the output `out.mp4`.
    pub fn generate(&self, args: &[&str]) -> Command {
        let mut command = handler();
        command.current_dir(self.dir.path()).arg("generate").args(tiny_args());
        command.args(["--output", "out.mp4"]).args(args);
        command
    }

    pub fn run(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.generate(args).output().unwrap())
    }

    /// Runs with the JSON `request` as `--input`.
    pub fn run_request(&self, request: &str, args: &[&str]) -> Outcome {
        self.write("request.json", request.as_bytes());
        self.run(&[&["--input", "request.json"], args].concat())
    }

    /// Runs with `image` and `audio` from this folder.
    pub fn run_with(&self, image: &str, audio: &str) -> Outcome {
        self.run(&["--image", image, "--audio", audio])
    }
}

/// A server on loopback that answers each path with fixed bytes.
pub struct Server {
    pub port: u16,
    /// The paths that were asked for.
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Serves until the process ends; `answer` makes the whole response to a path, head and all.
    pub fn start(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, log) = (Arc::new(answer), asked.clone());
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (answer, log) = (answer.clone(), log.clone());
                thread::spawn(move || {
                    let Some(path) = read_path(&mut stream) else { return };
                    log.lock().unwrap().push(path.clone());
                    answer(&path, &mut stream);
                });
            }
        });
        Self { port, asked }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

/// The path of the first request on `stream`.
fn read_path(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let text = String::from_utf8(head).ok()?;
    Some(text.split_whitespace().nth(1)?.to_string())
}

/// Answers with `body`. The client may hang up in the middle; that is its right.
pub fn ok(stream: &mut TcpStream, body: &[u8]) {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

/// Answers with a status and one more header line.
pub fn empty(stream: &mut TcpStream, status: &str, header: &str) {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n{header}\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
}

/// The file at `path`, as bytes.
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}
