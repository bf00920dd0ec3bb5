//! `handler bench`: how long each stage takes on this machine.

use clap::ValueEnum;
use serde_json::{Value, json};
use talkie::registry::Registry;

use super::print_line;
use crate::bench::{self, Stage};
use crate::job::{Code, JobError};

/// Arguments of the verb.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model whose stages are timed
    #[arg(long, env = "BENCH_MODEL", default_value = "tiny")]
    model: String,
    /// Where the weights come from
    #[arg(long, env = "BENCH_WEIGHTS", value_enum, default_value_t)]
    weights: WeightsChoice,
    /// Only this stage; may be repeated
    #[arg(long = "stage", env = "BENCH_STAGES", value_delimiter = ',', value_name = "NAME")]
    stages: Vec<String>,
    /// Timed runs of each stage, after one that is not counted
    #[arg(long, env = "BENCH_RUNS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// One line of JSON per stage in place of a table
    #[arg(long, env = "BENCH_JSON")]
    json: bool,
    /// Print what each stage does, as JSON for tests/benches/peer.py, and time nothing
    #[arg(long, env = "BENCH_DESCRIBE")]
    describe: bool,
}

/// Where the weights of the timed networks come from.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum WeightsChoice {
    /// Drawn from a seed: nothing is downloaded, and speed does not depend on the values.
    #[default]
    Random,
}

/// Times the stages and prints each as soon as it is done.
pub(super) fn run(args: &Args) -> Result<(), JobError> {
    let WeightsChoice::Random = args.weights;
    let registry = Registry::built_in()?;
    let stages = chosen(bench::stages(registry.model(&args.model)?)?, &args.stages)?;
    if args.describe {
        let stages: Vec<Value> = stages.iter().map(describe).collect();
        return print_line(
            &json!({"threads": candle_core::utils::get_num_threads(), "stages": stages}).to_string(),
        );
    }
    let device = talkie::device::select(talkie::device::Preference::Auto)?;
    if !args.json {
        print_line(&format!(
            "{:<18} {:<32} {:>11} {:>11}  per second",
            "stage", "shape", "median ms", "best ms"
        ))?;
    }
    for stage in stages {
        let mut times = bench::measure(&mut stage.prepare(&device)?, args.runs as usize, &device)?;
        times.sort_by(f64::total_cmp);
        let (median, best) = (median(&times), times[0]);
        let (amount, unit) = stage.amount();
        print_line(&match args.json {
            true => json!({"stage": stage.name, "median_ms": median, "best_ms": best, "runs": args.runs})
                .to_string(),
            false => {
                let rate = amount / median * 1e3;
                format!(
                    "{:<18} {:<32} {median:>11.2} {best:>11.2}  {rate:.1} {unit}",
                    stage.name,
                    stage.shape()
                )
            }
        })?;
    }
    Ok(())
}

/// The stages called `names`, in the order of the bench; all of them without names.
fn chosen(stages: Vec<Stage>, names: &[String]) -> Result<Vec<Stage>, JobError> {
    let known: Vec<&str> = stages.iter().map(|stage| stage.name).collect();
    if let Some(stray) = names.iter().find(|name| !known.contains(&name.as_str())) {
        let message = format!("there is no stage `{stray}`, expected one of {}", known.join(", "));
        return Err(JobError::new(Code::InvalidInput, message));
    }
    let wanted = |stage: &Stage| names.is_empty() || names.iter().any(|name| name == stage.name);
    Ok(stages.into_iter().filter(wanted).collect())
}

fn describe(stage: &Stage) -> Value {
    let mut value = json!(stage);
    value["shape_text"] = stage.shape().into();
    value
}

/// The middle of sorted values, or the mean of the two middle ones.
fn median(sorted: &[f64]) -> f64 {
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_that_does_not_exist_is_named_with_those_that_do() {
        let stages = || bench::stages(Registry::built_in().unwrap().model("tiny").unwrap()).unwrap();
        let error = chosen(stages(), &["vae_decod".to_string()]).unwrap_err();
        assert!(error.message.contains("`vae_decod`") && error.message.contains("vae_decode, "), "{error:?}");
        assert_eq!(chosen(stages(), &["clip".to_string()]).unwrap().len(), 1);
        assert_eq!(chosen(stages(), &[]).unwrap().len(), stages().len());
    }

    #[test]
    fn the_median_lies_in_the_middle() {
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
