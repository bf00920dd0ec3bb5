//! The clock of the benchmarks.

use std::time::{Duration, Instant};

use candle_core::Device;
use talkie::Result;
use talkie::nn::work::{self, Operation};

use super::Run;

/// What was seen of a stage.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Milliseconds of each run, the fastest first.
    pub times: Vec<f64>,
    /// What one run takes at the least.
    pub operations: Vec<Operation>,
}

impl Measured {
    /// The middle of the times, or the mean of the two middle ones.
    pub fn median(&self) -> f64 {
        let (low, high) = (self.times[(self.times.len() - 1) / 2], self.times[self.times.len() / 2]);
        (low + high) / 2.0
    }
}

/// Times `runs` runs on `device`, at least one, after one that is not timed. Work that the device does in the
/// background is waited for before the clock stops.
///
/// # Errors
/// What the work returns.
pub fn measure(run: &mut Run, runs: usize, device: &Device) -> Result<Measured> {
    let mut once = || -> Result<Duration> {
        let start = Instant::now();
        run()?;
        device.synchronize()?;
        Ok(start.elapsed())
    };
    let (warmed_up, operations) = work::count(&mut once);
    warmed_up?;
    let mut times =
        (0..runs.max(1)).map(|_| Ok(once()?.as_secs_f64() * 1e3)).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(Measured { times, operations })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[test]
    fn the_first_run_is_not_counted() {
        let calls = Rc::new(Cell::new(0));
        let counter = Rc::clone(&calls);
        let mut run: Run = Box::new(move || {
            counter.set(counter.get() + 1);
            Ok(())
        });
        assert_eq!(measure(&mut run, 3, &Device::Cpu).unwrap().times.len(), 3);
        assert_eq!(calls.get(), 4);
    }

    #[test]
    fn the_median_lies_in_the_middle() {
        let median = |times: &[f64]| Measured { times: times.to_vec(), operations: vec![] }.median();
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
