//! Numbers in queries.

use std::ops::RangeInclusive;

use super::Query;
use crate::gateway::error::ApiError;
use crate::job::Code;

impl Query {
    /// The whole number that the parameter `name` holds.
    ///
    /// # Errors
    /// When it is none, or not within `range`.
    pub(super) fn number(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let (least, most) = (*range.start(), *range.end());
        let Some(text) = self.parameter(name)? else { return Ok(None) };
        match text.parse().ok().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let shown: String = text.chars().take(40).collect();
                let message =
                    format!("`{name}` is {shown:?}, expected a whole number from {least} to {most}");
                Err(ApiError::new(Code::InvalidInput, message))
            }
        }
    }

    /// The parameter `name`; the last one, where it is given more than once.
    fn parameter(&self, name: &str) -> Result<Option<String>, ApiError> {
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&self.0);
        let pairs = pairs.map_err(|_| ApiError::new(Code::InvalidInput, "the query is malformed"))?;
        Ok(pairs.0.into_iter().rev().find(|(key, _)| key == name).map(|(_, value)| value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_within_its_range_or_refused() {
        let number = |uri: &str| Query(uri.parse().unwrap()).number("wait", 1000..=3000).ok();
        assert_eq!(number("/x"), Some(None));
        assert_eq!(number("/x?wait=1000&a=%zz"), Some(Some(1000)));
        assert_eq!(number("/x?wait=1&wait=3000"), Some(Some(3000)));
        for bad in ["", "1", "3001", "-1", "1e3", "+2000", "2000.0", "%ff", "99999999999999999999"] {
            assert_eq!(number(&format!("/x?wait={bad}")), None, "{bad}");
        }
    }
}
