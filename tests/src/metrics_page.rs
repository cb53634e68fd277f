//! A `/metrics` page, read as text.

/// One scrape.
#[derive(Clone, Debug)]
pub struct MetricsPage(pub String);

impl MetricsPage {
    /// The value of a series, named as the page names it. Panics when it is not there, since every
    /// series exists from the start.
    pub fn value(&self, series: &str) -> f64 {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no series {series} in\n{}", self.0))
    }
}
