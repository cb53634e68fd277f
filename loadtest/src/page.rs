//! The report as one HTML file that needs nothing else: no script, no font, no network.
//!
//! Knows layout and words. Must not know how anything was measured.

use std::fmt::Write;

use crate::{
    chart::{Line, Scale, chart, plain},
    findings::Findings,
    report::{Count, Ms, Report, Seconds},
    timeline::{Mark, Moment},
};

/// The page of a run.
#[must_use]
pub fn render(report: &Report) -> String {
    let verdict = if report.passed() {
        "every check passed"
    } else {
        "NOT every check passed"
    };
    let class = if report.passed() { "pass" } else { "fail" };
    let title = escape(&report.title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style>\
         <h1>{title}</h1><p class=\"verdict {class}\">{verdict}</p>"
    );
    page += "<div class=\"tiles\">";
    for (name, value, note) in tiles(report) {
        _ = write!(
            page,
            "<div><span>{}</span><b>{}</b><small>{}</small></div>",
            escape(&name),
            escape(&value),
            escape(&note)
        );
    }
    page += "</div><h2>Promises</h2><table>";
    for check in &report.checks {
        let (class, word) = if check.passed {
            ("pass", "PASS")
        } else {
            ("fail", "FAIL")
        };
        _ = write!(
            page,
            "<tr><td class=\"{class}\">{word}</td><td>{}</td><td>{}</td></tr>",
            escape(check.promise),
            escape(&check.detail)
        );
    }
    for (is_checked, what) in [
        (report.lost.is_some(), "the store was not checked"),
        (
            report.freshness_checked.is_some(),
            "freshness was not checked",
        ),
    ] {
        if !is_checked {
            _ = write!(page, "<tr><td>&ndash;</td><td>{what}</td><td></td></tr>");
        }
    }
    page += "</table>";
    let charts: Vec<String> = charts(&report.timeline, &report.marks);
    if !charts.is_empty() {
        page += "<h2>Over time</h2><div class=\"charts\">";
        page.extend(charts);
        page += "</div>";
    }
    page += &fates(report);
    page += &breaks(report);
    if let Some(seed) = report.seed {
        _ = write!(page, "<p>The same again: <code>--seed {seed}</code></p>");
    }
    page += "<footer>Latencies are open-loop: they count from when a ping was due, so a stall is not \
             hidden. All load, the checker and, unless told otherwise, the gateway ran on one machine.\
             </footer></html>\n";
    page
}

fn tiles(report: &Report) -> Vec<(String, String, String)> {
    let ack = &report.ack_ms;
    let mut tiles: Vec<(&str, String, String)> = vec![
        (
            "acknowledged",
            Count(report.acked).to_string(),
            format!(
                "of {} sent, by {} devices",
                Count(report.sent),
                Count(report.devices)
            ),
        ),
        (
            "rate",
            format!("{}/s", Count::of(report.pings_per_s)),
            format!("over {}", Seconds(report.seconds)),
        ),
        (
            "ack, p50",
            Ms(ack.p50).to_string(),
            format!("p90 {}", Ms(ack.p90)),
        ),
        (
            "ack, p99",
            Ms(ack.p99).to_string(),
            format!("p99.9 {}, max {}", Ms(ack.p999), Ms(ack.max)),
        ),
    ];
    if let Some(freshness) = report.freshness_ms {
        tiles.push((
            "durable to checker, p99",
            Ms(freshness.p99).to_string(),
            format!("p50 {}, max {}", Ms(freshness.p50), Ms(freshness.max)),
        ));
    }
    if let Some(rss_bytes) = report.gateway.rss_bytes {
        let connections = Count(report.gateway.connections.unwrap_or_default());
        let each = report
            .gateway
            .bytes_per_connection
            .map_or_else(String::new, |bytes| {
                format!(", {:.1} KB each", bytes as f64 / 1_000.0)
            });
        tiles.push((
            "gateway memory",
            mebibytes(rss_bytes as f64),
            format!("{connections} connections{each}"),
        ));
    }
    if let Some(cpu_s) = report.gateway.cpu_s {
        let each = cpu_s * 1e6 / report.acked.max(1) as f64;
        tiles.push((
            "gateway CPU",
            Seconds(cpu_s).to_string(),
            format!("{each:.0} µs a ping"),
        ));
    }
    let common = tiles
        .into_iter()
        .map(|(name, value, note)| (name.to_owned(), value, note));
    let own = report.findings.iter().flat_map(Findings::tiles);
    common.chain(own).collect()
}

fn charts(timeline: &[Moment], marks: &[Mark]) -> Vec<String> {
    let at_s: Vec<f64> = timeline.iter().map(|moment| moment.at_s).collect();
    let line = |name, class, of: &dyn Fn(&Moment) -> Option<f64>| Line {
        name,
        class,
        values: timeline.iter().map(of).collect(),
    };
    let count = |value: f64| Count::of(value).to_string();
    let latencies = [
        line("p50", 'a', &|moment| moment.ack_p50_ms),
        line("p99", 'b', &|moment| moment.ack_p99_ms),
        line("max", 'c', &|moment| moment.ack_max_ms),
    ];
    let rates = [line("acknowledged", 'a', &|moment| {
        Some(moment.pings_per_s)
    })];
    let open = [line("open", 'b', &|moment| Some(moment.open as f64))];
    let devices = [line("connected", 'a', &|moment| {
        Some(moment.connected as f64)
    })];
    let lags = [line("behind", 'a', &|moment| {
        moment.freshness_lag_ms.map(|ms| ms as f64)
    })];
    let mebibytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / MEBIBYTE);
    let memory = [
        line("gateway", 'a', &|moment| {
            mebibytes(moment.gateway_rss_bytes)
        }),
        line("load test", 'c', &|moment| mebibytes(moment.own_rss_bytes)),
    ];
    let cpus = [line("processors busy", 'b', &|moment| moment.gateway_cpus)];
    let ms = |value: f64| format!("{} ms", plain(value));
    [
        chart(
            "Due to acknowledged",
            &at_s,
            marks,
            &latencies,
            Scale::Logarithmic,
            ms,
        ),
        chart("Pings a second", &at_s, marks, &rates, Scale::Linear, count),
        chart(
            "Pings waiting for their ack",
            &at_s,
            marks,
            &open,
            Scale::Linear,
            count,
        ),
        chart(
            "Devices connected",
            &at_s,
            marks,
            &devices,
            Scale::Linear,
            count,
        ),
        chart("Freshness stream", &at_s, marks, &lags, Scale::Linear, ms),
        chart(
            "Gateway memory",
            &at_s,
            marks,
            &memory,
            Scale::Linear,
            |value| format!("{} MiB", plain(value)),
        ),
        chart("Gateway CPU", &at_s, marks, &cpus, Scale::Linear, |value| {
            plain(value)
        }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn fates(report: &Report) -> String {
    let fates = [
        ("accepted", report.accepted),
        ("duplicate", report.duplicate),
        ("filtered", report.filtered),
        ("rejected", report.rejected),
        ("untold", report.untold),
        ("dropped by devices", report.dropped),
    ];
    let most = fates
        .iter()
        .map(|(_, pings)| *pings)
        .max()
        .unwrap_or(0)
        .max(1);
    let mut table = "<h2>What became of the pings</h2><table class=\"bars\">".to_owned();
    for (fate, pings) in fates {
        let percent = pings as f64 * 100.0 / most as f64;
        _ = write!(
            table,
            "<tr><td>{fate}</td><td>{}</td><td><i style=\"width:{percent:.1}%\"></i></td></tr>",
            Count(pings)
        );
    }
    table + "</table>"
}

fn breaks(report: &Report) -> String {
    if report.breaks.is_empty() {
        return String::new();
    }
    let mut list = "<h2>Connections that broke</h2><ul>".to_owned();
    for (reason, count) in &report.breaks {
        _ = write!(list, "<li>{} × {}</li>", Count(*count), escape(reason));
    }
    list + "</ul>"
}

fn mebibytes(bytes: f64) -> String {
    format!("{} MiB", Count::of(bytes / MEBIBYTE))
}

const MEBIBYTE: f64 = (1 << 20) as f64;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2430;--dim:#667;--line:#d5dae2;--a:#1f6feb;--b:#d9730d;--c:#a0a7b4;--good:#1a7f37;--bad:#c4302b;--card:#f6f8fa}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#99a;--line:#333a45;--a:#6cb0ff;--b:#ffa657;--c:#6b7380;--good:#56d364;--bad:#ff7b72;--card:#1a1f27}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:70rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}\
.verdict{font-weight:600;margin:.3rem 0 1.2rem}.pass{color:var(--good)}.fail{color:var(--bad)}td.pass,td.fail{font-weight:600}\
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.7rem}\
.tiles div{background:var(--card);border-radius:.5rem;padding:.7rem .9rem;display:flex;flex-direction:column}\
.tiles span,.tiles small,footer{color:var(--dim);font-size:.85rem}.tiles b{font-size:1.35rem;font-variant-numeric:tabular-nums}\
table{border-collapse:collapse;width:100%}td{padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top;font-variant-numeric:tabular-nums}\
.bars td:nth-child(2){text-align:right;width:8rem}.bars td:nth-child(3){width:60%}.bars i{display:block;height:.8rem;margin-top:.3rem;background:var(--a);border-radius:.2rem;min-width:1px}\
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}\
figure{margin:0}figcaption{font-weight:600;font-size:.9rem}figcaption span{font-weight:400;margin-left:.8rem}\
figcaption .a{color:var(--a)}figcaption .b{color:var(--b)}figcaption .c{color:var(--c)}\
svg{width:100%;height:auto}svg text{font-size:12px;fill:var(--dim)}.grid{stroke:var(--line);stroke-width:1}.mark{stroke:var(--dim);stroke-width:1;stroke-dasharray:3 3}\
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c);stroke-width:1.2}\
footer{margin-top:2rem}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn the_page_needs_nothing_else_and_says_the_verdict() {
        let mut report = example();
        report.timeline = (1..=3)
            .map(|at| Moment {
                at_s: f64::from(at),
                pings_per_s: 100.0,
                ack_p99_ms: Some(2.0),
                ..Moment::default()
            })
            .collect();
        let page = render(&report);
        assert!(page.contains("every check passed") && page.contains("99,999"));
        assert!(page.contains("Due to acknowledged") && !page.contains("Gateway CPU"));
        for outside in ["http:", "https:", "src=", "<script", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn a_failed_check_is_seen_and_texts_cannot_break_the_page() {
        let mut report = example();
        report.checks[0].passed = false;
        report.checks[0].detail = "1 < 2 & <script>".to_owned();
        let page = render(&report);
        assert!(page.contains("NOT every check passed"));
        assert!(page.contains("1 &lt; 2 &amp; &lt;script&gt;") && !page.contains("<script>"));
    }
}
