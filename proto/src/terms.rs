//! On what terms the holder shares: how exact a position may be when it is stored, and how dense positions may be.
//!
//! Knows the grids and how a ping becomes one that says no more than its cell. Must not know who enforces it or
//! when: the session coarsens whatever arrives, and the device's record thins it out.
//!
//! # The grid
//!
//! A row of cells is so many degrees of latitude high that rows tile the globe from pole to pole; a cell is as wide
//! as its row is high, as nearly as a whole number of cells around the globe allows. Whatever lies in a cell is stored
//! as its centre. That hides where in the cell the device was and nothing else: a trail of cells is still a trail.

use crate::{
    ping::{MAX_LATITUDE_E7, MAX_LONGITUDE_E7, Ping},
    v1::Precision,
};

/// What the holder lets be stored. The default is everything, as exactly as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How exact a stored position may be.
    pub precision: Precision,
    /// How dense stored positions may be.
    pub density: Density,
}

/// How dense stored positions may be. The default is as dense as they come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Density {
    /// At least this much device time lies between two pings stored one after the other, in milliseconds; 0 for any.
    pub least_interval_ms: u64,
    /// And at least this many metres; 0 for any.
    pub least_distance_m: u32,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            precision: Precision::Exact,
            density: Density::default(),
        }
    }
}

impl Terms {
    /// Takes the stricter of each.
    #[must_use]
    pub fn stricter(self, other: Self) -> Self {
        Self {
            precision: self.precision.max(other.precision),
            density: Density {
                least_interval_ms: self
                    .density
                    .least_interval_ms
                    .max(other.density.least_interval_ms),
                least_distance_m: self
                    .density
                    .least_distance_m
                    .max(other.density.least_distance_m),
            },
        }
    }

    /// Takes out of a ping what may not be stored: the place within its cell, and with a grid also what would give
    /// it away: altitude, speed, course and heading. The accuracy becomes at least that of the cell.
    pub fn coarsen(&self, ping: &mut Ping) {
        let Some((row_e7, corner_dm)) = grid(self.precision) else {
            return;
        };
        let (latitude, longitude) = (ping.latitude_e7.into(), ping.longitude_e7.into());
        ping.latitude_e7 = cell_centre(latitude, MAX_LATITUDE_E7, HALF_CIRCLE_E7 / row_e7);
        let parallel = (f64::from(ping.latitude_e7) * 1e-7).to_radians().cos();
        #[expect(
            clippy::cast_possible_truncation,
            reason = "at most as many as on the equator, which is four million"
        )]
        let columns = ((CIRCLE_E7 / row_e7) as f64 * parallel).round() as i64;
        ping.longitude_e7 = cell_centre(longitude, MAX_LONGITUDE_E7, columns.max(1));
        ping.accuracy_dm = Some(corner_dm.max(ping.accuracy_dm.unwrap_or(0)));
        ping.altitude_dm = None;
        ping.speed_cm_per_s = None;
        ping.course_ddeg = None;
        ping.heading_deg = None;
    }
}

/// The middle of that of `cells` equal cells between -`most_e7` and `most_e7` in which a coordinate lies.
fn cell_centre(e7: i64, most_e7: i32, cells: i64) -> i32 {
    let span = 2 * i64::from(most_e7);
    // The far end belongs to the last cell.
    let cell = ((e7 + i64::from(most_e7)) * cells / span).min(cells - 1);
    let centre = (2 * cell + 1) * span / (2 * cells) - i64::from(most_e7);
    i32::try_from(centre).expect("within the span")
}

/// A grid: how high a row is in 1e-7 degrees of latitude, and how far a corner of its cells is from their centre, in
/// decimetres. None for exact positions. A degree is 111.195 km on the mean sphere of [`Ping::distance_m`], so 900 are
/// 10.0 m; each height divides 180 degrees.
fn grid(precision: Precision) -> Option<(i64, u32)> {
    match precision {
        Precision::Exact => None,
        Precision::Grid10M => Some((900, 71)),
        Precision::Grid100M => Some((9_000, 708)),
        Precision::Grid1Km => Some((90_000, 7_077)),
        Precision::Grid10Km => Some((900_000, 70_765)),
    }
}

const HALF_CIRCLE_E7: i64 = 2 * MAX_LATITUDE_E7 as i64;
const CIRCLE_E7: i64 = 2 * MAX_LONGITUDE_E7 as i64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRIDS: [(Precision, f64); 4] = [
        (Precision::Grid10M, 10.0),
        (Precision::Grid100M, 100.0),
        (Precision::Grid1Km, 1_000.0),
        (Precision::Grid10Km, 10_000.0),
    ];

    fn terms(precision: Precision) -> Terms {
        Terms {
            precision,
            ..Terms::default()
        }
    }

    fn coarse(precision: Precision, latitude_e7: i32, longitude_e7: i32) -> (i32, i32) {
        let mut ping = Ping::at(1, 0, latitude_e7, longitude_e7);
        terms(precision).coarsen(&mut ping);
        (ping.latitude_e7, ping.longitude_e7)
    }

    proptest! {
        #[test]
        fn a_position_becomes_the_centre_of_a_cell_of_about_the_size_that_was_asked_for(
            latitude_e7 in -MAX_LATITUDE_E7..=MAX_LATITUDE_E7,
            longitude_e7 in -MAX_LONGITUDE_E7..=MAX_LONGITUDE_E7,
        ) {
            for (precision, size_m) in GRIDS {
                let (north, east) = coarse(precision, latitude_e7, longitude_e7);
                prop_assert!(north.abs() <= MAX_LATITUDE_E7 && east.abs() <= MAX_LONGITUDE_E7);
                prop_assert_eq!(coarse(precision, north, east), (north, east), "a centre stays");
                let moved_m = Ping::at(1, 0, latitude_e7, longitude_e7).distance_m(north, east);
                // At a pole a cell is a slice of a cake, so its corner is further off.
                prop_assert!(moved_m <= 1.2 * size_m, "{:?} moved by {} m", precision, moved_m);
            }
        }

        #[test]
        fn whoever_is_nearby_in_the_same_cell_is_stored_as_the_same(
            latitude_e7 in -890_000_000..890_000_000,
            longitude_e7 in -MAX_LONGITUDE_E7..MAX_LONGITUDE_E7,
            north in -200..200,
            east in -200..200,
        ) {
            // The middle of a cell of 10 m is 450 from its rim.
            let (latitude_e7, longitude_e7) = coarse(Precision::Grid10M, latitude_e7, longitude_e7);
            prop_assert_eq!(
                coarse(Precision::Grid10M, latitude_e7 + north, longitude_e7 + east),
                (latitude_e7, longitude_e7)
            );
        }
    }

    #[test]
    fn the_cells_of_a_grid_are_as_many_as_fit() {
        // All positions of a square of 5 km, each 20 m, land on the cells of 1 km that it touches.
        let mut cells = std::collections::BTreeSet::new();
        for north in 0..250 {
            for east in 0..250 {
                cells.insert(coarse(
                    Precision::Grid1Km,
                    535_000_000 + north * 1_800,
                    100_000_000 + east * 3_026, // 20 m at 53.5 degrees
                ));
            }
        }
        assert!((25..=36).contains(&cells.len()), "{}", cells.len());
    }

    #[test]
    fn the_ends_of_the_globe_have_cells_too() {
        for (precision, _) in GRIDS {
            for latitude_e7 in [-MAX_LATITUDE_E7, 0, MAX_LATITUDE_E7] {
                for longitude_e7 in [-MAX_LONGITUDE_E7, MAX_LONGITUDE_E7] {
                    let (north, east) = coarse(precision, latitude_e7, longitude_e7);
                    assert!(north.abs() < MAX_LATITUDE_E7 && east.abs() < MAX_LONGITUDE_E7);
                }
            }
        }
    }

    #[test]
    fn what_would_give_the_place_away_goes_and_the_rest_stays() {
        let exact = Ping {
            accuracy_dm: Some(12),
            altitude_dm: Some(3_000),
            speed_cm_per_s: Some(140),
            course_ddeg: Some(900),
            heading_deg: Some(91),
            battery_percent: Some(55),
            ..Ping::at(7, 99, 535_123_457, 101_234_567)
        };
        let mut ping = exact;
        terms(Precision::Exact).coarsen(&mut ping);
        assert_eq!(ping, exact);
        terms(Precision::Grid100M).coarsen(&mut ping);
        let coarse = Ping {
            battery_percent: Some(55),
            accuracy_dm: Some(708),
            ..Ping::at(7, 99, ping.latitude_e7, ping.longitude_e7)
        };
        assert_eq!(ping, coarse);
        let mut vague = Ping {
            accuracy_dm: Some(50_000),
            ..exact
        };
        terms(Precision::Grid100M).coarsen(&mut vague);
        assert_eq!(vague.accuracy_dm, Some(50_000));
    }

    #[test]
    fn of_two_terms_the_stricter_holds() {
        let terms = |precision, least_interval_ms, least_distance_m| Terms {
            precision,
            density: Density {
                least_interval_ms,
                least_distance_m,
            },
        };
        let one = terms(Precision::Grid1Km, 5, 7);
        let other = terms(Precision::Grid10M, 60, 0);
        let both = terms(Precision::Grid1Km, 60, 7);
        assert_eq!((one.stricter(other), other.stricter(one)), (both, both));
        assert_eq!(Terms::default().stricter(one), one);
    }
}
