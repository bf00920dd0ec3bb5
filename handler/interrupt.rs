//! Ctrl-C and SIGTERM: the first asks the generation to end, the second ends the process.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use talkie::pipeline::Cancel;

use crate::job::{Code, JobError};

/// The exit code of a process that was told twice to end.
const EXIT_INTERRUPTED: i32 = 1;

/// What an interrupt acts on.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    cancel: Cancel,
    parts: Arc<Mutex<Vec<PathBuf>>>,
}

impl Interrupt {
    /// Listens from now on; once per process. Unless `quiet`, the first interrupt is acknowledged on standard
    /// error.
    ///
    /// # Errors
    /// [`Code::Internal`] when the system refuses.
    pub fn listen(quiet: bool) -> Result<Self, JobError> {
        let interrupt = Self::default();
        let (cancel, parts) = (interrupt.cancel.clone(), interrupt.parts.clone());
        let asked = AtomicBool::new(false);
        ctrlc::set_handler(move || {
            if !asked.swap(true, Ordering::SeqCst) {
                cancel.cancel();
                if !quiet {
                    eprintln!("ending at the next step; Ctrl-C again ends at once");
                }
                return;
            }
            for part in parts.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                // It may have been renamed or removed already.
                let _ = std::fs::remove_file(part);
            }
            process::exit(EXIT_INTERRUPTED);
        })
        .map_err(|e| JobError::new(Code::Internal, format!("signals cannot be handled: {e}")))?;
        Ok(interrupt)
    }

    /// The switch that the first interrupt sets.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// Adds a file that the second interrupt removes.
    pub fn guard(&self, part: &Path) {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).push(part.to_path_buf());
    }
}
