//! `handler serve`: the gateway.

mod flags;

use std::io::Write;
use std::net::{SocketAddr, TcpListener};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::gateway::{Running, server};
use crate::job::{Code, JobError};
use crate::memory;

pub(super) use self::flags::{Args, data_dir, make_private};

/// Threads that serve: waiting for disk and network needs no more.
const THREADS: usize = 2;
const STACK_BYTES: usize = 512 * 1024;

/// Serves until the process is told to end.
pub(super) fn run(args: &Args, config: &Config) -> Result<(), JobError> {
    memory::give_back_freed();
    no_core_dumps();
    // Whoever connects from now on is answered as soon as the store is open.
    let listener = bind(args.addr()?)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
        .map_err(|e| JobError::new(Code::Internal, format!("no threads can be started: {e}")))?;
    let ended = runtime.block_on(serve(args, config, listener));
    // Whoever still waits for an answer waits in vain.
    runtime.shutdown_background();
    ended
}

async fn serve(args: &Args, config: &Config, listener: TcpListener) -> Result<(), JobError> {
    let mut signals = Signals::listen()?;
    let addr = listener.local_addr().map_err(|e| unusable(None, &e))?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(|e| unusable(Some(addr), &e))?;
    let setup = args.setup(config, addr)?;
    let (page, limits) = (setup.config.public_url.clone(), setup.config.connections.clone());
    let running = Running::start(setup)?;
    running.gateway.auth.check_reach()?;
    let closing = CancellationToken::new();
    let serving = tokio::spawn(server::serve(listener, running.router(), limits, closing.clone()));
    announce(addr, &page);

    signals.next().await;
    let end = async {
        // Workers post their last results through the server.
        running.gateway.pool.shutdown().await;
        closing.cancel();
        let served = serving.await;
        running.close().await;
        served.map_err(|e| JobError::new(Code::Internal, format!("the server has failed: {e}")))
    };
    tokio::select! {
        ended = end => ended,
        () = signals.next() => Err(JobError::new(Code::Cancelled, "told twice to end: ended at once")),
    }
}

/// What tells the process to end. That a terminal was closed does not.
struct Signals {
    interrupts: Signal,
    terminations: Signal,
    _hangups: Signal,
}

impl Signals {
    fn listen() -> Result<Self, JobError> {
        let refused = |e| JobError::new(Code::Internal, format!("signals cannot be handled: {e}"));
        let listen = |kind| signal(kind).map_err(refused);
        Ok(Self {
            interrupts: listen(SignalKind::interrupt())?,
            terminations: listen(SignalKind::terminate())?,
            _hangups: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupts.recv() => {}
            _ = self.terminations.recv() => {}
        }
    }
}

fn bind(addr: SocketAddr) -> Result<TcpListener, JobError> {
    let listener = TcpListener::bind(addr).map_err(|e| unusable(Some(addr), &e))?;
    listener.set_nonblocking(true).map_err(|e| unusable(Some(addr), &e))?;
    Ok(listener)
}

fn unusable(addr: Option<SocketAddr>, e: &std::io::Error) -> JobError {
    let addr = addr.map_or_else(|| "the address".to_string(), |addr| addr.to_string());
    JobError::new(Code::InvalidInput, format!("`ADDR` (--addr): {addr} cannot be listened on: {e}"))
        .with_reason("CONFIG")
}

/// One line for programs, and one for people. There may be nobody who reads them.
fn announce(addr: SocketAddr, page: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "listening on http://{addr}\nopen {page}/ in a browser, or POST to {page}/run");
    let _ = out.flush();
}

/// A core dump would hold keys. Workers inherit this.
fn no_core_dumps() {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a structure that lives until the call returns. A refusal changes nothing.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
}
