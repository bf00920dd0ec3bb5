//! Points at which a test kills this process or makes a step fail, named in `docs/RELIABILITY.md`, and jobs that
//! say themselves how they go wrong. Without the feature `faults` they are nothing.

/// Kills the process, as `kill -9` would, where the variable `KILL_AT` names this point. `KILL_AT=K8:3` kills
/// it at the third passage.
#[inline]
pub fn kill_point(name: &str) {
    #[cfg(feature = "faults")]
    active::kill_point(name);
    #[cfg(not(feature = "faults"))]
    let _ = name;
}

#[cfg(feature = "faults")]
pub use directives::Directive;

#[cfg(feature = "faults")]
mod active {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    pub(super) fn kill_point(name: &str) {
        let wanted = WANTED.get_or_init(|| {
            let text = std::env::var("KILL_AT").ok()?;
            match text.split_once(':') {
                Some((name, passage)) => Some((name.to_string(), passage.parse().ok()?)),
                None => Some((text, 1)),
            }
        });
        let Some((wanted, passage)) = wanted else { return };
        if wanted == name && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *passage {
            // SAFETY: the call takes no pointers; it ends this process, which is its purpose.
            unsafe { libc::raise(libc::SIGKILL) };
        }
    }
}

#[cfg(feature = "faults")]
mod directives {
    use std::io::Write;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use talkie::media::image::Size;
    use talkie::media::video::{Quality, VideoOptions, VideoWriter, thumbnail_jpeg};
    use talkie::pipeline::{Cancel, Progress, Settings, Stage, Timings, Video};
    use talkie::{Error, ErrorKind, Result};

    /// Between two looks at the switch that cancels.
    const POLL: Duration = Duration::from_millis(5);
    /// A step of `fault: steps N`.
    const STEP: Duration = Duration::from_millis(50);
    /// The stand-in's frames, and their sides in pixels.
    const FRAMES: usize = 5;
    const SIDE: usize = 64;

    /// What a job does in place of a generation. Where `FAULTS_FROM_PROMPT=1`, its prompt says so: `fault: wait`.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub enum Directive {
        /// Makes a small video at once; of at least this many bytes.
        Instant {
            /// 0 for as few as it takes.
            bytes: usize,
        },
        /// Makes a step, then waits until it is cancelled.
        Wait,
        /// Makes a step, then never returns.
        Hang,
        /// Ends the process.
        Abort,
        /// Finds no memory: always, or at 720p only.
        OutOfMemory {
            /// Where it is made again at 480p, there is enough.
            only_720p: bool,
        },
        /// Finds no memory the first time that this process is asked to.
        OutOfMemoryOnce,
        /// Breaks the device.
        Sticky,
        /// Panics.
        Panic,
        /// Finds values that are not finite.
        Numeric,
        /// Makes this many steps, then a small video.
        Steps(usize),
    }

    impl Directive {
        /// What the prompt asks for, if this process obeys.
        pub fn read(prompt: &str) -> Option<Self> {
            let obeys = || std::env::var_os("FAULTS_FROM_PROMPT").is_some_and(|set| set == "1");
            let words = prompt.strip_prefix("fault:")?.trim();
            if !obeys() {
                return None;
            }
            Some(match words {
                "instant" => Self::Instant { bytes: 0 },
                "wait" => Self::Wait,
                "hang" => Self::Hang,
                "abort" => Self::Abort,
                "oom" => Self::OutOfMemory { only_720p: false },
                "oom at 720p" => Self::OutOfMemory { only_720p: true },
                "oom once" => Self::OutOfMemoryOnce,
                "sticky" => Self::Sticky,
                "panic" => Self::Panic,
                "nan" => Self::Numeric,
                words => match words.split_once(' ')? {
                    ("instant", bytes) => Self::Instant { bytes: bytes.trim().parse().ok()? },
                    ("steps", steps) => Self::Steps(steps.trim().parse().ok()?),
                    _ => return None,
                },
            })
        }

        /// Does it. `settings` are those of the job; the video goes to `output`.
        ///
        /// # Errors
        /// As the directive says.
        pub fn obey(
            &self,
            settings: &Settings,
            output: &Path,
            cancel: &Cancel,
            progress: &mut dyn FnMut(Progress),
        ) -> Result<Video> {
            let mut step = |step, steps| {
                progress(Progress { windows: 1, step, steps, ..Progress::at(Stage::Denoise) });
            };
            let cuda = |name: &str| Err(Error::new(ErrorKind::Inference, format!("DriverError({name})")));
            const NO_MEMORY: &str = "CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\"";
            match self {
                Self::Instant { bytes } => return stand_in(settings, output, *bytes),
                Self::Wait => loop {
                    // The report shows that the job lives.
                    step(1, 100);
                    cancel.check()?;
                    std::thread::sleep(POLL);
                },
                Self::Hang => {
                    step(1, 100);
                    loop {
                        std::thread::park();
                    }
                }
                Self::Abort => std::process::abort(),
                Self::OutOfMemory { only_720p } => {
                    // The buckets of 480p have less than half the pixels of those of 720p.
                    let square = settings.video_size(Size { height: 512, width: 512 });
                    if !only_720p || square.height * square.width > LARGE {
                        return cuda(NO_MEMORY);
                    }
                }
                Self::OutOfMemoryOnce => {
                    if !RAN_OUT.swap(true, Ordering::Relaxed) {
                        return cuda(NO_MEMORY);
                    }
                }
                Self::Sticky => return cuda("CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\""),
                Self::Panic => panic!("as the prompt asked"),
                Self::Numeric => return Err(Error::new(ErrorKind::Numeric, "the latents are not finite")),
                Self::Steps(steps) => {
                    for done in 1..=*steps {
                        cancel.check()?;
                        std::thread::sleep(STEP);
                        step(done, *steps);
                    }
                    let (step, steps) = (*steps, *steps);
                    progress(Progress { windows: 1, step, steps, ..Progress::at(Stage::Decode) });
                }
            }
            stand_in(settings, output, 0)
        }
    }

    static RAN_OUT: AtomicBool = AtomicBool::new(false);

    /// More pixels than a square of `tiny` has at 480p.
    const LARGE: usize = 128 * 128;

    /// A small video, filled up to `bytes` with what players pass over.
    fn stand_in(settings: &Settings, output: &Path, bytes: usize) -> Result<Video> {
        let options = VideoOptions {
            width: SIDE,
            height: SIDE,
            frames: FRAMES as u64,
            quality: Quality::default(),
            audio: None,
        };
        let frame = |i: usize| vec![(i * 50) as u8; SIDE * SIDE * 3];
        let mut writer = VideoWriter::create(output, options)?;
        for i in 0..FRAMES {
            if i == FRAMES / 2 {
                super::kill_point("K18");
            }
            writer.push(frame(i))?;
        }
        let thumbnail = settings.thumbnail.then(|| thumbnail_jpeg(&frame(0), SIDE, SIDE)).transpose()?;
        let mut size_bytes = writer.finish()?.size_bytes;
        if (size_bytes as usize) < bytes {
            let unwritten = |e: std::io::Error| Error::new(ErrorKind::Encode, e.to_string());
            let free = vec![0; (bytes - size_bytes as usize).saturating_sub(8)];
            let head = [&(free.len() as u32 + 8).to_be_bytes()[..], b"free"].concat();
            let mut file = std::fs::File::options().append(true).open(output).map_err(unwritten)?;
            file.write_all(&head).and_then(|()| file.write_all(&free)).map_err(unwritten)?;
            size_bytes += head.len() as u64 + free.len() as u64;
        }
        Ok(Video {
            frames: FRAMES,
            size: Size { height: SIDE, width: SIDE },
            size_bytes,
            seed: settings.seed,
            thumbnail,
            remade_windows: 0,
            timings: Timings::default(),
            loading: None,
            plan: None,
        })
    }
}
