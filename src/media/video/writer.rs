//! The writer that the pipeline uses: a thread of its own behind a bounded channel.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::recorder::{Recorder, Recording, write_error};
use super::{FPS, Quality, encode_error};
use crate::{Error, Result};

/// What a video consists of.
pub struct VideoOptions {
    /// Pixels per row; even.
    pub width: usize,
    /// Rows; even.
    pub height: usize,
    /// Frames that will come. With more the file is valid, but its index follows the media.
    pub frames: u64,
    /// How fine the picture is.
    pub quality: Quality,
    /// The voice; none makes a silent video.
    pub audio: Option<AudioTrack>,
}

/// The voice of a video.
pub struct AudioTrack {
    /// One of [`SAMPLE_RATES_HZ`](super::SAMPLE_RATES_HZ).
    pub sample_rate_hz: u32,
    /// 1 or 2.
    pub channels: u16,
    /// Samples of each channel that the track lasts, exactly: a source that gives fewer is followed by
    /// silence, one that gives more is cut. 0 makes a silent video.
    pub samples: u64,
    /// Blocks of interleaved samples in −1…1, of any length; values outside are clamped. They are pulled
    /// as the frames come, so the source may decode on the way.
    pub blocks: Box<dyn Iterator<Item = Result<Vec<f32>>> + Send>,
}

/// A finished video.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VideoSummary {
    /// Frames written.
    pub frames: u64,
    /// Size of the file.
    pub size_bytes: u64,
    /// How long the picture lasts: frames / 25.
    pub duration: Duration,
    /// Whether the index comes before the media, so that playing starts while the file downloads.
    pub faststart: bool,
    /// The coarsest quantiser of all frames; above that of the [`Quality`] when the bitrate was capped.
    pub coarsest_quantizer: u8,
}

/// Frames wait in at most this much memory …
const CHANNEL_BYTES: usize = 256 << 20;
/// … and are at most one window of the model, so that the next one can start at once.
const CHANNEL_FRAMES: usize = 81;

/// Encodes and writes a video on its own thread while the caller makes the next frames.
///
/// The file grows as `<path>.part` and takes its name when it is complete: under `path` there never is
/// half a video. Dropping the writer without [`finish`](Self::finish) ends the thread and removes it.
pub struct VideoWriter {
    frame_bytes: usize,
    /// `None` when the thread has ended.
    thread: Option<EncoderThread>,
}

struct EncoderThread {
    messages: SyncSender<Message>,
    abandoned: Arc<AtomicBool>,
    handle: JoinHandle<Result<VideoSummary>>,
}

enum Message {
    Frame(Vec<u8>),
    Finish,
}

impl VideoWriter {
    /// Starts a video at `path`.
    ///
    /// # Errors
    /// Kind `Encode` when a side is odd or of a size that H.264 has not, when the rate or number of
    /// channels of the audio is not one that AAC has, or when the file cannot be created.
    pub fn create(path: &Path, options: VideoOptions) -> Result<Self> {
        let frame_bytes = options.width.saturating_mul(options.height).saturating_mul(3);
        let capacity = (CHANNEL_BYTES / frame_bytes.max(1)).clamp(1, CHANNEL_FRAMES);
        Self::with_capacity(path, options, capacity)
    }

    /// As [`Self::create`] with room for `capacity` frames before `push` blocks.
    pub(super) fn with_capacity(path: &Path, options: VideoOptions, capacity: usize) -> Result<Self> {
        let frame_bytes = options.width.saturating_mul(options.height).saturating_mul(3);
        let (part, file) = PartFile::create(path)?;
        let recorder = Recorder::new(BufWriter::with_capacity(1 << 18, file), options)?;
        let (messages, receiver) = sync_channel(capacity);
        let abandoned = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&abandoned);
        let handle = std::thread::Builder::new()
            .name("video-encoder".into())
            .spawn(move || record(recorder, part, &receiver, &flag))
            .map_err(|e| encode_error(format!("the encoder thread could not start: {e}")).with_source(e))?;
        Ok(Self { frame_bytes, thread: Some(EncoderThread { messages, abandoned, handle }) })
    }

    /// Hands over the next `frame`: 8-bit RGB, row-major (H, W, 3). Blocks while the encoder is too far
    /// behind.
    ///
    /// # Errors
    /// Kind `Encode` when the frame has another size. When encoding, writing, or reading the audio
    /// failed since the last call, that error, once; later calls get a plain one.
    pub fn push(&mut self, frame: Vec<u8>) -> Result<()> {
        if frame.len() != self.frame_bytes {
            let (found, expected) = (frame.len(), self.frame_bytes);
            return Err(encode_error(format!("a video frame has {found} bytes, expected {expected}")));
        }
        let thread = self.thread.as_ref().ok_or_else(already_failed)?;
        match thread.messages.send(Message::Frame(frame)) {
            Ok(()) => Ok(()),
            // The thread only leaves before the end when it failed.
            Err(_) => match self.join() {
                Ok(_) => Err(already_failed()),
                Err(error) => Err(error),
            },
        }
    }

    /// Encodes what is waiting, completes the file and gives it its name.
    ///
    /// # Errors
    /// As [`Self::push`]; also when there was no frame. The unfinished file is removed.
    pub fn finish(mut self) -> Result<VideoSummary> {
        let thread = self.thread.as_ref().ok_or_else(already_failed)?;
        // When the thread is gone, joining tells why.
        let _ = thread.messages.send(Message::Finish);
        self.join()
    }

    fn join(&mut self) -> Result<VideoSummary> {
        let thread = self.thread.take().ok_or_else(already_failed)?;
        drop(thread.messages);
        thread.handle.join().unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(encode_error(format!("the encoder thread panicked: {text}")))
        })
    }
}

impl Drop for VideoWriter {
    fn drop(&mut self) {
        if let Some(thread) = &self.thread {
            thread.abandoned.store(true, Ordering::Relaxed);
            // Nobody is left to hear what became of an abandoned video.
            let _ = self.join();
        }
    }
}

fn already_failed() -> Error {
    encode_error("the video has failed before")
}

/// The thread: takes frames until the end, then names the file.
fn record(
    mut recorder: Recorder<BufWriter<File>>,
    part: PartFile,
    messages: &Receiver<Message>,
    abandoned: &AtomicBool,
) -> Result<VideoSummary> {
    loop {
        match messages.recv() {
            _ if abandoned.load(Ordering::Relaxed) => break,
            Ok(Message::Frame(rgb)) => recorder.frame(&rgb)?,
            Ok(Message::Finish) => {
                let Recording { file, frames, coarsest_quantizer } = recorder.finish()?;
                // Closed first: some systems do not rename an open file.
                drop(file.sink);
                part.keep()?;
                return Ok(VideoSummary {
                    frames,
                    size_bytes: file.size_bytes,
                    duration: Duration::from_millis(frames * 1000 / u64::from(FPS)),
                    faststart: file.faststart,
                    coarsest_quantizer,
                });
            }
            Err(_) => break,
        }
    }
    Err(encode_error("the video was abandoned"))
}

/// A file that is removed unless it is kept.
struct PartFile {
    part: PathBuf,
    path: PathBuf,
    kept: bool,
}

impl PartFile {
    /// `<path>.part`, empty.
    fn create(path: &Path) -> Result<(Self, File)> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|e| {
            encode_error(format!("the video file `{}` cannot be created: {e}", part.display())).with_source(e)
        })?;
        Ok((Self { part, path: path.to_owned(), kept: false }, file))
    }

    /// Gives the file its name, over any older one.
    fn keep(mut self) -> Result<()> {
        std::fs::rename(&self.part, &self.path).map_err(write_error)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if !self.kept {
            // A file that cannot be removed is not worth hiding the error that led here.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}
