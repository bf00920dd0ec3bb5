//! Which of two ways an operation is computed: by a kernel of ours, or by candle's operations, which are slower, need
//! more memory, and are what the kernels' tests compare with.

use std::cell::Cell;

thread_local! {
    static PLAIN: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with candle's operations in place of our kernels, on this thread. Convolutions on the CPU have one form
/// only, for which their weights are packed.
pub fn plainly<T>(f: impl FnOnce() -> T) -> T {
    /// Sets back what was set, also where `f` panics.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            PLAIN.set(self.0);
        }
    }
    let _before = Before(PLAIN.replace(true));
    f()
}

/// Whether candle's operations are asked for on this thread.
pub fn are_plain() -> bool {
    PLAIN.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_are_back_afterwards_also_after_a_panic() {
        assert!(!are_plain());
        plainly(|| {
            plainly(|| assert!(are_plain()));
            assert!(are_plain(), "an inner switch does not end the outer one");
        });
        let _ = std::panic::catch_unwind(|| plainly(|| panic!("as the test asks")));
        assert!(!are_plain());
        std::thread::scope(|scope| plainly(|| scope.spawn(|| assert!(!are_plain())).join())).unwrap();
    }
}
