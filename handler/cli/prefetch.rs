//! `handler prefetch`: fills the volume with models, verified, before anybody waits for them.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::builder::FalseyValueParser;
use serde::Serialize;
use talkie::registry::{ModelSpec, PRESETS, Registry, RepoFiles};

use super::display::Display;
use super::install::{install, runtime};
use crate::config::Config;
use crate::generate;
use crate::hub::{FileReport, Hub, Standing, bytes};
use crate::interrupt::Interrupt;
use crate::job::{Code, JobError};

/// Stands for every model, preset or LoRA.
const ALL: &str = "all";

/// Flags of the verb.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Args {
    /// A profile to fetch, or all; several with commas [default: the first that has files]
    #[arg(long, env = "TALKIE_MODEL", value_name = "NAME", value_delimiter = ',')]
    model: Vec<String>,
    /// For videos of how many persons
    #[arg(long, env = "PREFETCH_SPEAKERS", value_enum, default_value_t)]
    speakers: Speakers,
    /// A preset whose LoRAs are fetched too, or all; several with commas
    #[arg(long, env = "PREFETCH_PRESET", value_name = "NAME", value_delimiter = ',')]
    preset: Vec<String>,
    /// A LoRA of the model to fetch too, or all; several with commas
    #[arg(long, env = "PREFETCH_LORAS", value_name = "NAME", value_delimiter = ',')]
    loras: Vec<String>,
    /// Only say what would be fetched, and whether there is room for it
    #[arg(long, env = "PREFETCH_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    /// Read every file again, and fetch those that have rotted
    #[arg(long, env = "PREFETCH_VERIFY", value_parser = FalseyValueParser::new())]
    verify: bool,
    /// Ask nobody: look for the files on this machine only
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
    offline: bool,
    /// A models.toml in place of the built-in one
    #[arg(long, env = "TALKIE_MODELS_FILE", value_name = "FILE")]
    models_file: Option<PathBuf>,
    /// No progress and no notes on standard error, only errors
    #[arg(short, long, env = "TALKIE_QUIET")]
    quiet: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Speakers {
    #[default]
    #[value(name = "1")]
    One,
    #[value(name = "2")]
    Two,
    Both,
}

impl Speakers {
    fn numbers(self) -> &'static [usize] {
        match self {
            Self::One => &[1],
            Self::Two => &[2],
            Self::Both => &[1, 2],
        }
    }
}

/// What was fetched, or would be.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    models: Vec<String>,
    storage: PathBuf,
    files: Vec<FileReport>,
    /// Bytes of all files whose size is known.
    total_bytes: u64,
    /// Files whose size is not known yet.
    unknown_sizes: usize,
    /// Bytes that are on this machine.
    have_bytes: u64,
    /// Bytes that are to be fetched.
    need_bytes: u64,
    free_bytes: u64,
    /// Bytes that came over the network.
    fetched_bytes: u64,
    duration_ms: u64,
}

/// Fetches, or says what would be fetched.
pub(super) fn run(args: &Args, config: &Config) -> Result<Report, JobError> {
    let registry =
        generate::registry(args.models_file.as_deref().filter(|path| !path.as_os_str().is_empty()))?;
    let models = args.models(&registry)?;
    let repos = args.repos(&models)?;
    let hub = match args.offline {
        true => config.hub.clone().offline(),
        false => config.hub.clone(),
    };
    let mut display = Display::new(args.quiet);
    let interrupt = (!args.dry_run).then(|| Interrupt::listen(args.quiet)).transpose()?;
    let installed = interrupt.map(|interrupt| {
        let shown =
            install(&hub, &repos, args.verify, interrupt.cancel(), &mut |update| display.show(&update));
        display.close();
        shown
    });
    let installed = installed.transpose()?;
    let (files, unasked) = runtime()?.block_on(hub.plan(&repos))?;
    if let Some(e) = unasked {
        display.note(&format!("sizes that are not known cannot be asked for: {}", e.message));
    }
    let names = models.iter().map(|model| model.name.clone()).collect();
    let mut report = Report::new(names, &hub, files)?;
    if let Some(installed) = installed {
        report.fetched_bytes = installed.bytes;
        report.duration_ms = generate::ms(installed.duration);
    }
    display.note(report.table().trim_end());
    let learned = pins(&repos, &report.files);
    if !learned.is_empty() {
        display.note(&format!("\nlearned from the hub; in models.toml it would be pinned as\n{learned}"));
    }
    Ok(report)
}

impl Args {
    fn models<'a>(&self, registry: &'a Registry) -> Result<Vec<&'a ModelSpec>, JobError> {
        let names: Vec<_> =
            self.model.iter().map(|name| name.trim()).filter(|name| !name.is_empty()).collect();
        if names.contains(&ALL) {
            return Ok(registry.models().collect());
        }
        if !names.is_empty() {
            return names.into_iter().map(|name| Ok(registry.model(name)?)).collect();
        }
        let first = registry.models().find(|model| model.files(1, &[]).next().is_some());
        first.map(|model| vec![model]).ok_or_else(|| {
            JobError::new(
                Code::InvalidInput,
                "no model of the registry has files, so there is nothing to fetch",
            )
        })
    }

    /// Everything that `models` need: their own settings, and what is asked for besides.
    fn repos(&self, models: &[&ModelSpec]) -> Result<Vec<RepoFiles>, JobError> {
        let mut repos = Vec::new();
        for model in models {
            let mut loras = model.generation(None, None)?.loras;
            for preset in expand(&self.preset, &PRESETS.map(str::to_string)) {
                loras.extend(model.generation(None, Some(&preset))?.loras);
            }
            let known: Vec<_> = model.loras.keys().cloned().collect();
            for lora in expand(&self.loras, &known) {
                if !known.contains(&lora) {
                    let message = format!(
                        "`--loras` is {lora:?}, expected one that model {} has: {}",
                        model.name,
                        known.join(", ")
                    );
                    return Err(JobError::new(Code::InvalidInput, message));
                }
                loras.push(lora);
            }
            for speakers in self.speakers.numbers() {
                repos.extend(model.files(*speakers, &loras).cloned());
            }
        }
        Ok(repos)
    }
}

/// The names that are asked for, of which `all` stands for every known one.
fn expand(asked: &[String], known: &[String]) -> Vec<String> {
    let names = asked.iter().map(|name| name.trim().to_string()).filter(|name| !name.is_empty());
    names.flat_map(|name| if name == ALL { known.to_vec() } else { vec![name] }).collect()
}

impl Report {
    fn new(models: Vec<String>, hub: &Hub, files: Vec<FileReport>) -> Result<Self, JobError> {
        let known = |of: fn(&FileReport) -> u64| files.iter().map(of).sum::<u64>();
        let missing = |file: &FileReport| match file.state {
            Standing::Ready | Standing::Unverified => 0,
            Standing::Partial | Standing::Missing => file.size.unwrap_or(0) - file.have_bytes,
        };
        Ok(Self {
            models,
            storage: hub.storage().root().to_path_buf(),
            total_bytes: known(|file| file.size.unwrap_or(0)),
            unknown_sizes: files.iter().filter(|file| file.size.is_none()).count(),
            have_bytes: known(|file| file.have_bytes),
            need_bytes: known(missing),
            free_bytes: hub.free_bytes()?,
            fetched_bytes: 0,
            duration_ms: 0,
            files,
        })
    }

    /// For people.
    fn table(&self) -> String {
        let mut table = String::new();
        for file in &self.files {
            let size = file.size.map_or("learn".to_string(), bytes);
            let state = match file.state {
                Standing::Ready => "ready".to_string(),
                Standing::Unverified => "unverified".to_string(),
                Standing::Partial => format!("{} there", bytes(file.have_bytes)),
                Standing::Missing => "missing".to_string(),
            };
            // Writing to a string does not fail.
            let _ = writeln!(table, "{size:>9}  {state:14} {}/{}", file.repo, file.path);
        }
        let unknown = match self.unknown_sizes {
            0 => String::new(),
            n => format!(" and {n} files of a size that the hub knows"),
        };
        let (total, have) = (bytes(self.total_bytes), bytes(self.have_bytes));
        let _ = writeln!(table, "{total:>9}  in {} files{unknown}, {have} there", self.files.len());
        let (need, free) = (bytes(self.need_bytes), bytes(self.free_bytes));
        let _ = writeln!(table, "{need:>9}  to fetch{unknown}, {free} free in {}", self.storage.display());
        if self.need_bytes > self.free_bytes {
            table += "there is too little room\n";
        }
        table
    }
}

/// What was learned of the files of `repos`, as it would stand in models.toml.
fn pins(repos: &[RepoFiles], reports: &[FileReport]) -> String {
    let mut text = String::new();
    let mut told: Vec<&RepoFiles> = Vec::new();
    for repo in repos {
        let report =
            |path: &str| reports.iter().find(|report| report.repo == repo.repo && report.path == path);
        let is_learned = |path: &str| report(path).is_some_and(|report| report.sha256.is_some());
        let revision = repo.files.iter().find_map(|file| report(&file.path)?.revision.clone());
        let is_new = repo.revision.known() != revision.as_ref()
            || repo.files.iter().any(|file| file.size.known().is_none() || file.sha256.known().is_none());
        if !is_new || told.contains(&repo) || !repo.files.iter().all(|file| is_learned(&file.path)) {
            continue;
        }
        told.push(repo);
        let revision = revision.as_deref().unwrap_or("learn");
        let _ = writeln!(text, "repo = {:?}\nrevision = {revision:?}\nfiles = [", repo.repo);
        for file in &repo.files {
            let Some(FileReport { size: Some(size), sha256: Some(sha256), .. }) = report(&file.path) else {
                continue;
            };
            let _ = writeln!(text, "    {{ path = {:?}, size = {size}, sha256 = {sha256:?} }},", file.path);
        }
        text += "]\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(change: impl Fn(&mut Args)) -> Args {
        let mut args = Args {
            model: Vec::new(),
            speakers: Speakers::One,
            preset: Vec::new(),
            loras: Vec::new(),
            dry_run: true,
            verify: false,
            offline: true,
            models_file: None,
            quiet: true,
        };
        change(&mut args);
        args
    }

    fn paths(args: &Args) -> Vec<String> {
        let registry = Registry::built_in().unwrap();
        let repos = args.repos(&args.models(&registry).unwrap()).unwrap();
        repos.iter().flat_map(|repo| repo.files.iter().map(|file| file.path.clone())).collect()
    }

    #[test]
    fn what_a_model_needs_is_what_its_own_settings_need_and_what_is_asked_for() {
        let plain = paths(&args(|_| {}));
        assert_eq!(plain.len(), 13, "{plain:?}");
        assert!(!plain.iter().any(|path| path.contains("multi/") || path.contains("lora")));
        let more = |change: fn(&mut Args)| {
            let all = paths(&args(change));
            all.into_iter().filter(|path| !plain.contains(path)).collect::<Vec<_>>()
        };
        assert_eq!(more(|a| a.speakers = Speakers::Both), ["multi/infinitetalk.safetensors"]);
        let (lightx2v, fusionx) = (
            "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
            "FusionX_LoRa/Wan2.1_I2V_14B_FusionX_LoRA.safetensors",
        );
        assert_eq!(more(|a| a.preset = vec!["draft".into()]), [lightx2v]);
        assert_eq!(more(|a| a.preset = vec!["all".into()]), [lightx2v, fusionx]);
        assert_eq!(more(|a| a.loras = vec!["fusionx".into()]), [fusionx]);
        assert_eq!(more(|a| a.model = vec!["infinitetalk-fast".into()]), [lightx2v]);
        assert_eq!(more(|a| a.model = vec!["tiny".into()]), [""; 0]);
    }

    #[test]
    fn unknown_names_are_refused() {
        let registry = Registry::built_in().unwrap();
        let unknown = args(|a| a.model = vec!["huge".into()]);
        assert_eq!(unknown.models(&registry).unwrap_err().code, Code::ModelNotFound);
        let model = registry.model("infinitetalk").unwrap();
        for unknown in [args(|a| a.loras = vec!["x".into()]), args(|a| a.preset = vec!["best".into()])] {
            let e = unknown.repos(&[model]).unwrap_err();
            assert!(e.code == Code::InvalidInput && e.message.contains("expected one"), "{e}");
        }
    }

    #[test]
    fn what_was_learned_can_be_pasted() {
        let registry = Registry::built_in().unwrap();
        let repos: Vec<_> = registry.model("infinitetalk").unwrap().files(1, &[]).cloned().collect();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let report = |repo: &RepoFiles, path: &str, sha256: Option<&str>| FileReport {
            repo: repo.repo.clone(),
            revision: Some(commit.into()),
            path: path.into(),
            size: Some(5),
            sha256: sha256.map(str::to_string),
            state: Standing::Ready,
            have_bytes: 5,
            place: PathBuf::new(),
        };
        let audio = repos.iter().find(|repo| repo.repo.starts_with("Tencent")).unwrap();
        let hash = "a".repeat(64);
        let reports = [report(audio, "model.safetensors", Some(&hash))];
        let expected = format!(
            "repo = \"TencentGameMate/chinese-wav2vec2-base\"\nrevision = \"{commit}\"\nfiles = [\n    \
             {{ path = \"model.safetensors\", size = 5, sha256 = \"{hash}\" }},\n]\n"
        );
        assert_eq!(pins(&repos, &reports), expected);
        assert_eq!(pins(&repos, &[report(audio, "model.safetensors", None)]), "");
        let vae = repos.iter().find(|repo| repo.files[0].path == "Wan2.1_VAE.pth").unwrap();
        let pinned = FileReport { revision: None, ..report(vae, "Wan2.1_VAE.pth", Some(&hash)) };
        assert_eq!(pins(&repos, &[pinned]), "", "nothing is known of it that is not written down");
    }
}
