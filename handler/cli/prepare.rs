//! `handler prepare`: converts a model's weights once, so that each later cold start reads a half to a third.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::Device;
use clap::ValueEnum;
use clap::builder::FalseyValueParser;
use serde::Serialize;
use talkie::prepared::{
    NetworkKind, Precision, Preparation, Prepared, PromptPreparation, Pruned, Record, Selection, fixed_texts,
    prune,
};
use talkie::registry::{ModelSpec, RepoFiles, TokenizerSource};
use talkie::weights::LoadMonitor;
use talkie::{Error, ErrorKind};

use super::display::Display;
use super::install::install;
use crate::config::Config;
use crate::generate::{self, DeviceChoice, contained, open_device};
use crate::hub::{Hold, Hub, Meter, Phase, Progress, bytes};
use crate::interrupt::Interrupt;
use crate::job::{Code, JobError};

/// What a volume needs besides the files: journals, records, folders.
const MARGIN_BYTES: u64 = 1 << 20;
/// Between two looks at how far it is.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// The profile whose weights are converted
    #[arg(long, env = "TALKIE_MODEL", value_name = "NAME", required_unless_present = "prune")]
    model: Option<String>,
    /// How DiT and text encoder are stored; the other networks are stored as models.toml says
    #[arg(long, env = "PREPARE_PRECISION", value_enum, default_value_t)]
    precision: Choice,
    /// For videos of how many persons
    #[arg(long, env = "PREPARE_SPEAKERS", value_name = "1|2", default_value = "1",
        value_parser = clap::value_parser!(u8).range(1..=2))]
    speakers: u8,
    /// The preset whose LoRAs are merged into the DiT [default: the model's own settings]
    #[arg(long, env = "PREPARE_PRESET", value_name = "draft|fast|balanced|quality")]
    preset: Option<String>,
    /// Read the files that are there, compare them with their records, and make damaged ones again
    #[arg(long, env = "PREPARE_VERIFY", value_parser = FalseyValueParser::new())]
    verify: bool,
    /// Only say what would be read, written and removed
    #[arg(long, env = "PREPARE_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    /// Remove prepared files that no model of models.toml has a use for
    #[arg(long, env = "PREPARE_PRUNE", value_parser = FalseyValueParser::new())]
    prune: bool,
    /// Leave out the rows of the model's own prompts, for which the text encoder is run
    #[arg(long, env = "PREPARE_SKIP_PROMPTS", value_parser = FalseyValueParser::new())]
    skip_prompts: bool,
    /// A models.toml in place of the built-in one
    #[arg(long, env = "TALKIE_MODELS_FILE", value_name = "FILE")]
    models_file: Option<PathBuf>,
    /// Where the text encoder is run; its rows are used on such a device only
    #[arg(long, env = "TALKIE_DEVICE", value_enum, default_value_t)]
    device: DeviceChoice,
    /// No progress and no notes on standard error, only errors
    #[arg(short, long, env = "TALKIE_QUIET")]
    quiet: bool,
}

/// How the two large networks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Choice {
    /// As models.toml says: bf16 for the models that are built in
    #[default]
    Bf16,
    /// 8-bit floats with a scale for each row
    Fp8,
}

/// What was made, or would be.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    model: Option<String>,
    precision: Choice,
    files: Vec<FileReport>,
    /// Bytes of source files that the files are made from which are not there.
    need_read_bytes: u64,
    /// Bytes to be written.
    need_write_bytes: u64,
    free_bytes: u64,
    /// Bytes of source files that were read.
    read_bytes: u64,
    duration_ms: u64,
    removed: Vec<Removed>,
}

/// A prepared file.
#[derive(Debug, Serialize)]
struct FileReport {
    /// A network's name, or `prompts`.
    of: &'static str,
    state: State,
    path: PathBuf,
    size: u64,
    /// `None` while it is not written.
    sha256: Option<String>,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    /// It was there.
    Ready,
    /// It was written by this call.
    Written,
    /// It was completed by this call.
    Resumed,
    /// Some of it is there.
    Partial,
    /// It is not there.
    Missing,
}

/// A file that was removed, or would be.
#[derive(Debug, Serialize)]
struct Removed {
    path: PathBuf,
    size: u64,
}

/// Converts and removes, or says what would be converted and removed.
pub(super) fn run(args: &Args, config: &Config) -> Result<Report, JobError> {
    let began = Instant::now();
    let registry =
        generate::registry(args.models_file.as_deref().filter(|path| !path.as_os_str().is_empty()))?;
    let interrupt = Interrupt::listen(args.quiet)?;
    let mut display = Display::new(args.quiet);
    let mut report = Report { model: args.model.clone(), precision: args.precision, ..Report::default() };
    if let Some(name) = &args.model {
        let spec = registry.model(name)?;
        let call = Call { args, spec, hub: &config.hub, interrupt: &interrupt };
        let done = call.prepare(&mut report, &mut display);
        display.close();
        done?;
    }
    if args.prune {
        let hold = match args.dry_run {
            true => None,
            false => Some(config.hub.hold(interrupt.cancel(), &mut |_| {})?),
        };
        let removed = prune(&registry, config.hub.storage(), args.dry_run)?;
        report.removed = removed.into_iter().map(|Pruned { path, size }| Removed { path, size }).collect();
        drop(hold);
    }
    report.duration_ms = generate::ms(began.elapsed());
    Ok(report)
}

/// One network: its file, or what has to be done for it.
enum Work {
    Done(NetworkKind, Box<Prepared>),
    ToDo(Box<Preparation>),
}

struct Call<'a> {
    args: &'a Args,
    spec: &'a ModelSpec,
    hub: &'a Hub,
    interrupt: &'a Interrupt,
}

impl Call<'_> {
    fn prepare(&self, report: &mut Report, display: &mut Display) -> Result<(), JobError> {
        let loras = self.spec.generation(None, self.args.preset.as_deref())?.loras;
        let speakers = self.args.speakers.into();
        let mut selection =
            Selection { spec: self.spec, storage: self.hub.storage(), speakers, loras: &loras };
        let device = open_device(self.args.device, |said| display.note(said))?;
        // The sources come first: whoever fetches takes the lock of the volume as well.
        let mut installed = None;
        if !self.args.dry_run {
            let repos = self.sources(&selection)?;
            let cancel = self.interrupt.cancel();
            let found = install(self.hub, &repos, false, cancel, &mut |update| display.show(&update))?;
            selection.storage = &installed.insert(found).storage;
        }
        let hold = match self.args.dry_run {
            true => None,
            false => Some(Arc::new(self.hold(display)?)),
        };
        let monitor = Arc::new(self.monitor(hold.clone()));
        let mut work = Vec::new();
        for kind in NetworkKind::ALL {
            work.extend(self.look(&selection, kind, &monitor, display)?);
        }
        self.check_room(&work, report, display)?;
        if self.args.dry_run {
            report.files = work.iter().map(planned).collect();
            return Ok(());
        }
        for work in work {
            report.files.push(match work {
                Work::Done(kind, file) => finished(kind.as_str(), *file, State::Ready),
                Work::ToDo(work) => {
                    let (kind, path) = (work.key().kind(), work.path());
                    let state = if work.bytes_there() > 0 { State::Resumed } else { State::Written };
                    let record = convert(*work, hold.as_deref(), display)?;
                    finished(kind.as_str(), Prepared { path, record }, state)
                }
            });
        }
        if !self.args.skip_prompts {
            report.files.extend(prompts(selection, &device, &monitor, display)?);
        }
        report.read_bytes = monitor.bytes_read();
        Ok(())
    }

    /// The files that are needed for what is not prepared yet.
    fn sources(&self, selection: &Selection) -> Result<Vec<RepoFiles>, JobError> {
        let mut repos = Vec::new();
        for kind in NetworkKind::ALL {
            if let Some(precision) = self.precision(selection, kind)
                && !selection.prepared(kind, precision).is_ok_and(|file| file.is_some())
            {
                repos.extend(selection.sources(kind)?.into_iter().cloned());
            }
        }
        if let (TokenizerSource::Files(files), false) = (&self.spec.tokenizer, self.args.skip_prompts) {
            repos.extend(files.iter().cloned());
        }
        Ok(repos)
    }

    /// How `kind` is to be stored; `None` where there is nothing to gain.
    fn precision(&self, selection: &Selection, kind: NetworkKind) -> Option<Precision> {
        let preparable = selection.preparable(kind);
        match self.args.precision {
            Choice::Bf16 => preparable.first().copied(),
            Choice::Fp8 => preparable.last().copied(),
        }
    }

    fn hold(&self, display: &mut Display) -> Result<Hold, JobError> {
        let mut meter = Meter::default();
        let mut report = |progress| display.show(&meter.update(progress, Instant::now()));
        self.hub.hold(self.interrupt.cancel(), &mut report)
    }

    /// Ends the work when it is cancelled, or when another process does it.
    fn monitor(&self, hold: Option<Arc<Hold>>) -> LoadMonitor {
        let cancel = self.interrupt.cancel().clone();
        LoadMonitor::new(move || {
            let what = match cancel.check() {
                Err(_) => "the preparation was cancelled",
                Ok(()) if hold.as_ref().is_some_and(|hold| hold.is_lost()) => {
                    "another process has taken the preparation over"
                }
                Ok(()) => return Ok(()),
            };
            Err(Error::new(ErrorKind::Cancelled, what).with_hint("run the same again: it goes on from there"))
        })
    }

    /// What is to be done for one network; nothing where there is nothing to gain.
    fn look(
        &self,
        selection: &Selection,
        kind: NetworkKind,
        monitor: &Arc<LoadMonitor>,
        display: &Display,
    ) -> Result<Option<Work>, JobError> {
        let Some(precision) = self.precision(selection, kind) else { return Ok(None) };
        let found = selection.prepared(kind, precision).and_then(|file| match file {
            Some(file) if self.args.verify => file.verify(monitor).map(|()| Some(file)),
            file => Ok(file),
        });
        match found {
            Ok(Some(file)) => return Ok(Some(Work::Done(kind, Box::new(file)))),
            Ok(None) => {}
            Err(e) if e.kind() == ErrorKind::ModelCorrupt => display.note(&format!("{e}: it is made again")),
            Err(e) => return Err(e.into()),
        }
        let exact = selection.precision(kind);
        if precision != exact && selection.prepared(kind, exact)?.is_some() {
            let (kind, exact) = (kind.as_str(), exact.as_str());
            display.note(&format!("{kind} is prepared in {exact} as well, and that file will be used"));
        }
        let to_do = Preparation::new(selection, kind, precision, Arc::clone(monitor)).map_err(|e| {
            let is_missing = e.kind() == ErrorKind::ModelNotFound;
            let hint = format!("run `handler prefetch --model {}`", selection.spec.name);
            let error = JobError::from(e);
            if is_missing { error.with_hint(hint) } else { error }
        });
        Ok(Some(Work::ToDo(Box::new(to_do?))))
    }

    /// Says what is to be read and written, and whether there is room for it.
    fn check_room(&self, work: &[Work], report: &mut Report, display: &Display) -> Result<(), JobError> {
        for work in work {
            if let Work::ToDo(work) = work {
                report.need_read_bytes += work.bytes_to_read();
                report.need_write_bytes += work.size() - work.bytes_there();
            }
        }
        let root = self.hub.storage().root();
        let (read, write, free) = (report.need_read_bytes, report.need_write_bytes, self.hub.free_bytes()?);
        report.free_bytes = free;
        display.note(&format!(
            "{}: {} to read, {} to write, {} free in {}",
            self.spec.name,
            bytes(read),
            bytes(write),
            bytes(free),
            root.display()
        ));
        if write == 0 || self.args.dry_run || write + MARGIN_BYTES <= free {
            return Ok(());
        }
        let message =
            format!("{} has {free} bytes free, expected {write} for prepared files", root.display());
        Err(JobError::new(Code::InsufficientDisk, message)
            .with_detail("need_bytes", write)
            .with_detail("free_bytes", free)
            .with_hint("free some space, take `--precision fp8`, or use a larger volume"))
    }
}

/// Writes one file, and shows how far it is.
fn convert(work: Preparation, hold: Option<&Hold>, display: &mut Display) -> Result<Record, JobError> {
    let (of, total) = (work.key().kind().as_str(), work.size());
    let (written, mut meter) = (AtomicU64::new(0), Meter::default());
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let record = scope.spawn(|| {
            let _ends_the_display = end;
            contained(|| work.run(&written))
        });
        while ended.recv_timeout(REPORT_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
            let done = written.load(Ordering::Relaxed);
            let mut update = meter.update(Progress { phase: Phase::Prepare, done, total }, Instant::now());
            update.message = format!("{of}: {}", update.message);
            display.show(&update);
            if let Some(hold) = hold {
                hold.tell(done, total);
            }
        }
        record.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Writes the rows of the model's own prompts, if they are not there; none where the encoder's weights are drawn.
fn prompts(
    selection: Selection,
    device: &Device,
    monitor: &Arc<LoadMonitor>,
    display: &Display,
) -> Result<Option<FileReport>, JobError> {
    let texts = fixed_texts(selection.spec)?;
    let Some(work) = PromptPreparation::new(selection, &texts, device)? else { return Ok(None) };
    if let Some(file) = work.finished()? {
        return Ok(Some(finished("prompts", file, State::Ready)));
    }
    display.note("the text encoder is read for the rows of the model's own prompts");
    let file = contained(|| work.run(device, Arc::clone(monitor)))?;
    Ok(Some(finished("prompts", file, State::Written)))
}

/// A file that is there.
fn finished(of: &'static str, file: Prepared, state: State) -> FileReport {
    let Prepared { path, record } = file;
    FileReport { of, state, path, size: record.size, sha256: Some(record.sha256) }
}

/// A file that is there or would be written.
fn planned(work: &Work) -> FileReport {
    match work {
        Work::Done(kind, file) => finished(kind.as_str(), Prepared::clone(file), State::Ready),
        Work::ToDo(work) => FileReport {
            of: work.key().kind().as_str(),
            state: if work.bytes_there() > 0 { State::Partial } else { State::Missing },
            path: work.path(),
            size: work.size(),
            sha256: None,
        },
    }
}
