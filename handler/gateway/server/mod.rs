//! Takes connections, with limits on their number and on how slow they may be.
//!
//! HTTP/1.1 alone: a server that also speaks HTTP/2 waits for the first bytes to tell which it is, and so never
//! closes a silent connection. TLS and HTTP/2 are the business of a proxy in front.

mod timed;

use std::any::Any;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Request, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Layer, ServiceExt};
use tower_http::catch_panic::CatchPanicLayer;

use self::timed::{TimedBody, TimedStream};
use super::error::ApiError;
use crate::job::{Code, JobError};

pub use self::timed::TooSlow;

/// The longest head of a request, in bytes; a longer one is answered with 431.
const HEAD_BYTES: usize = 64 * 1024;
/// Between two tries to accept a connection when the system has no room for it.
const FULL_PAUSE: Duration = Duration::from_millis(100);
/// Between two lines in the log about that.
const FULL_LOG_PERIOD: Duration = Duration::from_secs(60);

/// What connections may do.
#[derive(Clone, Debug)]
pub struct Limits {
    /// At once; further ones wait.
    pub connections: usize,
    /// At once from one address; further ones are closed. This machine's own addresses do not count, since a proxy
    /// on it speaks for many.
    pub per_address: usize,
    /// For the head of a request, from the first moment of the connection or the end of the request before.
    pub head: Duration,
    /// For each 5 KiB of a body, or its end.
    pub body: Duration,
    /// How long a client may take nothing of an answer.
    pub write: Duration,
    /// For requests under way when the server ends.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 2048,
            per_address: 64,
            head: Duration::from_secs(5),
            body: Duration::from_secs(5),
            write: Duration::from_secs(30),
            grace: Duration::from_secs(5),
        }
    }
}

/// Is cancelled when the server is ending; in the extensions of each request, for those that would wait.
#[derive(Clone, Debug, Default)]
pub struct Closing(pub CancellationToken);

/// Serves `router` until `closing` is cancelled and the requests under way have been answered.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, closing: CancellationToken) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let (addresses, tasks) = (Addresses::default(), TaskTracker::new());
    let mut logged: Option<Instant> = None;
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let permit = connections.clone().acquire_owned().await.ok();
            listener.accept().await.map(|(stream, peer)| (permit, stream, peer))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = closing.cancelled() => break,
        };
        let (permit, stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) if is_of_one_connection(&e) => continue,
            Err(e) => {
                // Out of descriptors or memory: those who are connected will leave some.
                if logged.is_none_or(|at| at.elapsed() > FULL_LOG_PERIOD) {
                    tracing::error!("no connection can be accepted for now: {e}");
                    logged = Some(Instant::now());
                }
                tokio::time::sleep(FULL_PAUSE).await;
                continue;
            }
        };
        let Some(place) = addresses.enter(peer.ip(), limits.per_address) else { continue };
        let connection = connection(stream, router.clone(), limits.clone(), closing.clone());
        tasks.spawn(async move {
            connection.await;
            drop((permit, place));
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// Whether a failure to accept says nothing about the next one.
fn is_of_one_connection(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// Answers the requests of one connection.
async fn connection(stream: TcpStream, router: Router, limits: Limits, closing: CancellationToken) {
    // Answers are written at once; waiting for more of them would only delay them.
    let _ = stream.set_nodelay(true);
    let handler = CatchPanicLayer::custom(panicked).layer(router);
    let ending = closing.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(|body| Body::new(TimedBody::new(body, limits.body)));
        request.extensions_mut().insert(Closing(ending.clone()));
        let answer = handler.clone().oneshot(request);
        async move { Ok::<_, Infallible>(answer.await.into_response()) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_header_size(HEAD_BYTES)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(TimedStream::new(stream, limits.write)), service);
    tokio::pin!(connection);
    // However a connection ends, there is nobody left to tell.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = closing.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(limits.grace, connection).await;
}

/// The answer to a request whose handling panicked. The connection is not used any further.
fn panicked(_: Box<dyn Any + Send>) -> Response {
    let incident = hex::encode(rand::random::<[u8; 8]>());
    tracing::error!(incident, "a request has failed in a way that was not foreseen: incident {incident}");
    let error = JobError::new(Code::Internal, "the request has failed in a way that was not foreseen")
        .with_hint("please report this with the log line of this incident and the one before it")
        .with_detail("incident", incident);
    let mut response = ApiError::from(error).into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// How many connections each address has.
#[derive(Clone, Debug, Default)]
struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One connection of an address; dropping it ends that.
struct Place {
    addresses: Addresses,
    address: IpAddr,
}

impl Addresses {
    /// Counts one more connection; None when that is one too many.
    fn enter(&self, address: IpAddr, most: usize) -> Option<Place> {
        let address = address.to_canonical();
        let mut counts = self.counts();
        let count = counts.entry(address).or_default();
        if *count >= most && !address.is_loopback() {
            return None;
        }
        *count += 1;
        Some(Place { addresses: self.clone(), address })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.addresses.counts();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_machines_have_a_share_of_the_connections() {
        let addresses = Addresses::default();
        let (far, mapped) = ("192.0.2.1".parse().unwrap(), "::ffff:192.0.2.1".parse().unwrap());
        let first = addresses.enter(far, 2).unwrap();
        let second = addresses.enter(mapped, 2).unwrap();
        assert!(addresses.enter(far, 2).is_none() && addresses.enter(mapped, 2).is_none());
        assert!(addresses.enter("192.0.2.2".parse().unwrap(), 2).is_some());
        drop(first);
        let third = addresses.enter(far, 2);
        assert!(third.is_some());
        let own: Vec<_> = (0..3).map(|_| addresses.enter("127.0.0.1".parse().unwrap(), 2)).collect();
        assert!(own.iter().all(Option::is_some));
        drop((second, third, own));
        assert!(addresses.counts().is_empty(), "nobody is remembered");
    }
}
