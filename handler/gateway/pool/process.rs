//! Worker processes: starting one, keeping what it prints, and knowing when it has ended.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::{mpsc::UnboundedReceiver, oneshot};

use super::worker::Signal;

/// Of what a worker has printed last, so much is kept in memory.
const TAIL_BYTES: usize = 16 * 1024;
/// A log file of this length is put aside, and the one that was aside is forgotten.
const LOG_BYTES: u64 = 1024 * 1024;
/// Logs of workers that are kept.
const LOGS: usize = 20;
/// How long the last words of a process that has ended may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Stacks of threads that do next to nothing.
const STACK_BYTES: usize = 256 * 1024;

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The binary.
    pub program: PathBuf,
    /// Its verb and flags.
    pub args: Vec<OsString>,
    /// Variables that it has besides this process' own.
    pub env: Vec<(OsString, OsString)>,
    /// Variables of this process that it must not have.
    pub hidden: Vec<&'static str>,
    /// Where clients and workers reach this gateway; without a slash at its end.
    pub base_url: String,
    /// The endpoint in the workers' URLs.
    pub endpoint: String,
    /// The folder of the workers' logs.
    pub logs: PathBuf,
    /// What `CUDA_VISIBLE_DEVICES` is for the workers, in turn. Empty where there is no GPU to share out.
    pub gpus: Vec<String>,
}

impl Launch {
    /// The command that starts the worker `id` with `key` on the GPU of `slot`.
    pub(super) fn command(&self, id: &str, key: &str, slot: usize, ping_interval: Duration) -> Command {
        let url = |route: &str| format!("{}/v2/{}/{route}", self.base_url, self.endpoint);
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        for name in &self.hidden {
            command.env_remove(name);
        }
        let gpu = if self.gpus.is_empty() { "CPU" } else { "GPU" };
        command
            .env("RUNPOD_WEBHOOK_GET_JOB", url(&format!("job-take/$ID?gpu={gpu}")))
            .env("RUNPOD_WEBHOOK_POST_OUTPUT", url(&format!("job-done/$RUNPOD_POD_ID/$ID?gpu={gpu}")))
            .env("RUNPOD_WEBHOOK_POST_STREAM", url(&format!("job-stream/$RUNPOD_POD_ID/$ID?gpu={gpu}")))
            .env("RUNPOD_WEBHOOK_PING", url(&format!("ping/$RUNPOD_POD_ID?gpu={gpu}")))
            .env("RUNPOD_PING_INTERVAL", ping_interval.as_millis().to_string())
            .env("RUNPOD_POD_ID", id)
            .env("RUNPOD_AI_API_KEY", key)
            .env("RUNPOD_ENDPOINT_ID", &self.endpoint)
            .env("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true");
        if !self.gpus.is_empty() {
            command.env("CUDA_VISIBLE_DEVICES", &self.gpus[slot % self.gpus.len()]);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }
}

type Order = (Command, oneshot::Sender<io::Result<Child>>);

/// A thread that starts processes. The system kills a worker when the thread that started it ends, so that has
/// to be one that ends with this process only.
#[derive(Debug)]
pub(super) struct Launcher(mpsc::Sender<Order>);

impl Launcher {
    pub(super) fn start(runtime: Handle) -> io::Result<Self> {
        let (orders, received) = mpsc::channel::<Order>();
        thread::Builder::new().name("launcher".to_string()).stack_size(STACK_BYTES).spawn(move || {
            let _inside = runtime.enter();
            for (mut command, reply) in received {
                // Whoever asked may have gone; the process is then killed by its handle.
                let _ = reply.send(command.spawn());
            }
        })?;
        Ok(Self(orders))
    }

    /// Starts `command` in a session of its own, which ends with this process. What it prints goes to `log`.
    pub(super) async fn spawn(&self, mut command: Command, log: Log) -> io::Result<Process> {
        let (output, input) = io::pipe()?;
        command.stdout(input.try_clone()?).stderr(input).kill_on_drop(true);
        let parent = std::process::id();
        // SAFETY: between fork and exec only system calls that are safe there are made, and nothing is allocated.
        unsafe { command.pre_exec(move || tie_to_parent(parent)) };
        let (reply, answer) = oneshot::channel();
        let ended = || io::Error::other("the thread that starts processes has ended");
        self.0.send((command, reply)).map_err(|_| ended())?;
        // The command, and with it this process' ends of the pipe, is dropped by the thread before the next.
        let child = answer.await.map_err(|_| ended())??;
        let printed = log.keep(output)?;
        Ok(Process { child, printed })
    }
}

/// For the child alone: a session of its own, and no life after its parent's.
fn tie_to_parent(parent: u32) -> io::Result<()> {
    // SAFETY: neither call takes a pointer.
    if unsafe { libc::setsid() } == -1 {
        return Err(io::Error::last_os_error());
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call takes integers; the signal is one that cannot be caught.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have ended before the line above, and then nothing would tell.
        // SAFETY: the call takes nothing and cannot fail.
        if u32::try_from(unsafe { libc::getppid() }) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

/// A process that was started.
pub(super) struct Process {
    child: Child,
    printed: oneshot::Receiver<()>,
}

impl Process {
    /// Waits for the end of the process, passing on `signals` until then. Whatever it has left behind in its
    /// session's first group is ended too.
    pub(super) async fn ended(mut self, mut signals: UnboundedReceiver<Signal>) -> io::Result<ExitStatus> {
        let group = self.child.id().and_then(|id| i32::try_from(id).ok());
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                Some(signal) = signals.recv() => {
                    // The process has not been waited for yet, so the number is still its own.
                    let Some(group) = group else { continue };
                    // SAFETY: the calls take integers. That the process has ended meanwhile is no harm.
                    unsafe {
                        match signal {
                            Signal::End => libc::kill(group, libc::SIGTERM),
                            Signal::Kill => libc::killpg(group, libc::SIGKILL),
                        }
                    };
                }
            }
        };
        if let Some(group) = group {
            // SAFETY: the call takes integers; a group that is empty is an error that says so.
            unsafe { libc::killpg(group, libc::SIGKILL) };
        }
        // One that has left the group may keep the pipe open for ever.
        let _ = tokio::time::timeout(LAST_WORDS, self.printed).await;
        status
    }
}

/// How a process ended, as the rest of a sentence.
pub(super) fn describe(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(libc::SIGKILL)) => {
                "was killed (signal 9), as the system does when memory runs out".to_string()
            }
            (None, Some(signal)) => format!("was ended by signal {signal}"),
            (None, None) => "ended".to_string(),
        },
        Err(e) => format!("ended in a way that cannot be told ({e})"),
    }
}

/// What a worker prints: its end in memory, more of it in a file.
#[derive(Clone, Debug)]
pub(super) struct Log {
    tail: Arc<Mutex<VecDeque<u8>>>,
    path: PathBuf,
}

impl Log {
    /// The log of the worker `id` in the folder `logs`, where the oldest make room for it.
    pub(super) fn new(logs: &Path, id: &str) -> Self {
        prune(logs);
        Self { tail: Arc::default(), path: logs.join(format!("{id}.log")) }
    }

    /// The last words, at most `most` bytes, from the start of a line where that is possible.
    pub(super) fn tail(&self, most: usize) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = tail.len().saturating_sub(most);
        let bytes: Vec<u8> = tail.iter().skip(skip).copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        match text.split_once('\n') {
            Some((_, whole)) if skip > 0 && !whole.is_empty() => whole.to_string(),
            _ => text.into_owned(),
        }
    }

    /// Keeps everything that comes from `output`, on a thread of its own; the receiver hears of its end.
    fn keep(self, mut output: PipeReader) -> io::Result<oneshot::Receiver<()>> {
        let (done, ended) = oneshot::channel::<()>();
        thread::Builder::new().name("log".to_string()).stack_size(STACK_BYTES).spawn(move || {
            let mut file = LogFile::open(self.path.clone());
            let mut piece = [0; 4096];
            loop {
                match output.read(&mut piece) {
                    Ok(0) => break,
                    Ok(n) => self.push(&piece[..n], &mut file),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            // Nobody may wait any more.
            let _ = done.send(());
        })?;
        Ok(ended)
    }

    fn push(&self, piece: &[u8], file: &mut LogFile) {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(piece);
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
        drop(tail);
        file.write(piece);
    }
}

/// A file that does not grow without end. It is a help to people: where it cannot be written, the worker goes
/// on.
struct LogFile {
    path: PathBuf,
    file: Option<File>,
    len: u64,
}

impl LogFile {
    fn open(path: PathBuf) -> Self {
        let file = File::options().create(true).append(true).open(&path);
        if let Err(e) = &file {
            tracing::warn!("a worker's log {} cannot be written: {e}", path.display());
        }
        Self { path, file: file.ok(), len: 0 }
    }

    fn write(&mut self, piece: &[u8]) {
        if self.len >= LOG_BYTES {
            // A log that cannot be put aside is written on, which is the lesser evil.
            let _ = fs::rename(&self.path, self.path.with_extension("old.log"));
            *self = Self::open(self.path.clone());
        }
        self.len += piece.len() as u64;
        if let Some(file) = &mut self.file
            && file.write_all(piece).is_err()
        {
            self.file = None;
        }
    }
}

/// Removes the oldest logs, so that with one more there are as many as are kept.
fn prune(logs: &Path) {
    let Ok(entries) = fs::read_dir(logs) else { return };
    let mut files: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "log"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let excess = (files.len() + 1).saturating_sub(LOGS);
    for (_, path) in files.into_iter().take(excess) {
        // It is looked at again with the next worker.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_starts_with_a_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path(), "w-1");
        let mut file = LogFile::open(log.path.clone());
        for i in 0..10_000 {
            log.push(format!("line {i}\n").as_bytes(), &mut file);
        }
        let tail = log.tail(40);
        assert_eq!(tail, "line 9997\nline 9998\nline 9999\n");
        assert!(log.tail(usize::MAX).len() <= TAIL_BYTES);
        let whole = fs::read_to_string(&log.path).unwrap();
        assert!(whole.starts_with("line 0\n") && whole.ends_with("line 9999\n"));
    }

    #[test]
    fn a_log_file_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = LogFile::open(dir.path().join("w-1.log"));
        for _ in 0..3 * LOG_BYTES / 4096 {
            file.write(&[b'x'; 4096]);
        }
        let bytes: u64 =
            fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * LOG_BYTES, "{bytes}");
    }

    #[test]
    fn old_logs_make_room() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..30 {
            fs::write(dir.path().join(format!("w-{i}.log")), "").unwrap();
        }
        fs::write(dir.path().join("notes.txt"), "").unwrap();
        prune(dir.path());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), LOGS - 1 + 1);
    }
}
