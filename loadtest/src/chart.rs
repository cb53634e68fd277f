//! Line charts as SVG text, for a page that needs nothing else.
//!
//! Knows scales, ticks and paths. Must not know what the numbers mean.

use std::fmt::Write;

use crate::timeline::Mark;

/// One line of a chart. Where it has no value there is a gap.
pub(crate) struct Line<'a> {
    pub(crate) name: &'a str,
    /// A class of the page's style sheet: `a`, `b` or `c`.
    pub(crate) class: char,
    pub(crate) values: Vec<Option<f64>>,
}

/// How values become heights.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Scale {
    /// From zero.
    Linear,
    /// By powers of ten.
    Logarithmic,
}

/// A chart of lines over the same moments. `None` when there is nothing to draw.
pub(crate) fn chart(
    title: &str,
    at_s: &[f64],
    marks: &[Mark],
    lines: &[Line<'_>],
    scale: Scale,
    written: impl Fn(f64) -> String,
) -> Option<String> {
    let values = || {
        lines
            .iter()
            .flat_map(|line| &line.values)
            .flatten()
            .copied()
    };
    let most = values().reduce(f64::max)?;
    let least = values().reduce(f64::min)?;
    let end_s = at_s.last().copied().filter(|&end_s| 0.0 < end_s)?;
    let ticks = match scale {
        Scale::Linear => linear_ticks(most),
        Scale::Logarithmic => decades(least, most),
    };
    let (bottom, top) = (*ticks.first()?, *ticks.last()?);
    let height = |value: f64| {
        let share = match scale {
            Scale::Linear => value / top,
            Scale::Logarithmic => (value.max(bottom) / bottom).log10() / (top / bottom).log10(),
        };
        HEIGHT - MARGIN - share.clamp(0.0, 1.0) * (HEIGHT - 2.0 * MARGIN)
    };
    let x = |at_s: f64| LEFT + at_s / end_s * (WIDTH - LEFT - MARGIN);

    let mut svg = format!(
        "<figure><figcaption>{title}{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">",
        lines
            .iter()
            .map(|line| format!(" <span class=\"{}\">{}</span>", line.class, line.name))
            .collect::<String>()
    );
    for &tick in &ticks {
        let y = height(tick);
        _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{:.0}\"/><text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - MARGIN,
            LEFT - 6.0,
            y + 4.0,
            written(tick)
        );
    }
    for tick in linear_ticks(end_s)
        .into_iter()
        .filter(|&tick| tick <= end_s)
    {
        _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
            x(tick),
            HEIGHT - 2.0,
            moment(tick)
        );
    }
    for (row, mark) in marks.iter().enumerate() {
        // Marks that follow each other closely do not write over each other.
        let y = MARGIN + MARK_ROW * ((row % MARK_ROWS) as f64 + 1.0);
        let at = x(mark.at_s.min(end_s));
        let (anchor, to) = match mark.at_s < LATE * end_s {
            true => ("start", at + 4.0),
            false => ("end", at - 4.0),
        };
        _ = write!(
            svg,
            "<path class=\"mark\" d=\"M{at:.1} {MARGIN}V{:.0}\"/><text x=\"{to:.1}\" y=\"{y:.0}\" text-anchor=\"{anchor}\">{}</text>",
            HEIGHT - MARGIN,
            mark.what
        );
    }
    for line in lines {
        let mut path = String::new();
        let mut is_drawing = false;
        for (&at_s, value) in at_s.iter().zip(&line.values) {
            if let Some(value) = value {
                let to = if is_drawing { 'L' } else { 'M' };
                _ = write!(path, "{to}{:.1} {:.1}", x(at_s), height(*value));
            }
            is_drawing = value.is_some();
        }
        _ = write!(svg, "<path class=\"line {}\" d=\"{path}\"/>", line.class);
    }
    svg += "</svg></figure>";
    Some(svg)
}

/// Zero and a few round numbers up to one that is not below `most`.
fn linear_ticks(most: f64) -> Vec<f64> {
    let rough = most.max(f64::MIN_POSITIVE) / 4.0;
    let decade = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .map(|factor| factor * decade)
        .into_iter()
        .find(|&step| rough <= step)
        .unwrap_or(10.0 * decade);
    (0..)
        .map(|count| f64::from(count) * step)
        .take_while(|&tick| tick < most + step)
        .collect()
}

/// Powers of ten around the values, two at least.
fn decades(least: f64, most: f64) -> Vec<f64> {
    let exponent = |value: f64| value.max(1e-3).log10();
    let first = exponent(least).floor();
    let last = exponent(most).ceil().max(first + 1.0);
    (0..)
        .map(|count| first + f64::from(count))
        .take_while(|&exponent| exponent <= last)
        .map(|exponent| 10f64.powf(exponent))
        .collect()
}

/// A tick without the digits that binary fractions add.
pub(crate) fn plain(value: f64) -> String {
    let digits = format!("{value:.4}");
    digits
        .trim_end_matches('0')
        .trim_end_matches('.')
        .to_owned()
}

fn moment(at_s: f64) -> String {
    if at_s < 600.0 {
        format!("{} s", plain(at_s))
    } else {
        format!("{:.0} min", at_s / 60.0)
    }
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 220.0;
const MARGIN: f64 = 22.0;
const LEFT: f64 = 72.0;
/// Between the words of two marks, from above.
const MARK_ROW: f64 = 14.0;
const MARK_ROWS: usize = 4;
/// From this share of the width on, words end where others begin.
const LATE: f64 = 0.85;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_everything() {
        assert_eq!(linear_ticks(10.0), [0.0, 2.5, 5.0, 7.5, 10.0]);
        assert_eq!(
            linear_ticks(9_700.0),
            [0.0, 2_500.0, 5_000.0, 7_500.0, 10_000.0]
        );
        assert_eq!(decades(0.4, 120.0), [0.1, 1.0, 10.0, 100.0, 1_000.0]);
        assert_eq!(decades(5.0, 5.0), [1.0, 10.0]);
    }

    #[test]
    fn ticks_are_written_as_people_do() {
        assert_eq!(
            [0.0, 0.1 + 0.2, 2.5, 100.0].map(plain),
            ["0", "0.3", "2.5", "100"]
        );
    }

    #[test]
    fn a_missing_value_is_a_gap_and_not_a_zero() {
        let line = Line {
            name: "rate",
            class: 'a',
            values: vec![Some(1.0), None, Some(2.0), Some(3.0)],
        };
        let svg = chart(
            "t",
            &[1.0, 2.0, 3.0, 4.0],
            &[],
            &[line],
            Scale::Linear,
            |v| v.to_string(),
        );
        let svg = svg.unwrap();
        let path = svg.split("class=\"line a\" d=\"").nth(1).unwrap();
        let path = path.split('"').next().unwrap();
        assert_eq!(
            (path.matches('M').count(), path.matches('L').count()),
            (2, 1),
            "{path}"
        );
    }

    #[test]
    fn what_began_is_marked() {
        let line = Line {
            name: "rate",
            class: 'a',
            values: vec![Some(1.0), Some(2.0)],
        };
        let mark = |at_s, what| Mark { at_s, what };
        let marks = [mark(1.0, "calm"), mark(9.5, "storm")];
        let written = |value: f64| value.to_string();
        let svg = chart("t", &[5.0, 10.0], &marks, &[line], Scale::Linear, written).unwrap();
        assert_eq!(svg.matches("class=\"mark\"").count(), 2);
        assert!(svg.contains("\"start\">calm<") && svg.contains("\"end\">storm<"));
    }

    #[test]
    fn nothing_is_no_chart() {
        let line = |values| Line {
            name: "",
            class: 'a',
            values,
        };
        let draw = |at_s: &[f64], values| {
            chart("", at_s, &[], &[line(values)], Scale::Linear, |v| {
                v.to_string()
            })
        };
        assert!(draw(&[1.0], vec![None]).is_none());
        assert!(draw(&[], vec![]).is_none());
        assert!(draw(&[0.0], vec![Some(1.0)]).is_none());
    }
}
