//! Bodies that have to come, and answers that have to be taken, in time.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::faults::kill_point;

/// The error of a body that did not come in time.
#[derive(Clone, Copy, Debug)]
pub struct TooSlow;

impl TooSlow {
    /// Whether `e` comes from a body that did not come in time.
    pub fn is_cause_of(e: &(dyn Error + 'static)) -> bool {
        e.is::<Self>() || e.source().is_some_and(Self::is_cause_of)
    }
}

impl fmt::Display for TooSlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the body came too slowly")
    }
}

impl Error for TooSlow {}

/// A body brings so much in each span of time, or ends.
const LEAST_BYTES: usize = 5 * 1024;

/// The body of a request. It fails when it stays out, and also when it only drips.
pub(super) struct TimedBody {
    body: Incoming,
    span: Duration,
    /// When the present span of time is over. Made when the body is first waited for, which costs the many requests
    /// without a body nothing.
    deadline: Option<Pin<Box<Sleep>>>,
    /// What has come in it.
    bytes: usize,
}

impl TimedBody {
    pub(super) fn new(body: Incoming, span: Duration) -> Self {
        Self { body, span, deadline: None, bytes: 0 }
    }
}

impl Body for TimedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame {
            this.bytes += frame.data_ref().map_or(0, Bytes::len);
            if this.bytes >= LEAST_BYTES {
                this.bytes = 0;
                if let Some(deadline) = &mut this.deadline {
                    deadline.as_mut().reset(Instant::now() + this.span);
                }
            }
        }
        if frame.is_pending() {
            let span = this.span;
            let deadline = this.deadline.get_or_insert_with(|| Box::pin(sleep(span)));
            ready!(deadline.as_mut().poll(cx));
            return Poll::Ready(Some(Err(TooSlow.into())));
        }
        frame.map(|frame| frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that fails when the other side takes nothing of what is written.
pub(super) struct TimedStream {
    stream: TcpStream,
    patience: Duration,
    /// While something waits to be taken.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl TimedStream {
    pub(super) fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, deadline: None }
    }

    /// `progress` as it is, unless nothing has moved for too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, progress: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.deadline = None;
            return progress;
        }
        let patience = self.patience;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // A test can end the process in the middle of an answer.
        let piece = if cfg!(feature = "faults") { &bytes[..bytes.len().div_ceil(2)] } else { bytes };
        let written = Pin::new(&mut self.stream).poll_write(cx, piece);
        if written.is_ready() {
            kill_point("K5");
        }
        self.in_time(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        !cfg!(feature = "faults") && self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.in_time(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.in_time(cx, shut)
    }
}
