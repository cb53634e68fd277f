//! One ping, valid by construction once it has come through [`crate::batch::decode`].
//!
//! Knows ranges of values and distance on the globe. Must not know the wire.

pub use crate::v1::{Source, reject::Code as RejectCode};

/// One sampled position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Its number within the epoch; at least 1.
    pub seq: u64,
    /// When it was sampled, by the device's clock, in milliseconds since 1970-01-01 UTC.
    pub time_ms: u64,
    /// Latitude in 1e-7 degrees, within ±[`MAX_LATITUDE_E7`].
    pub latitude_e7: i32,
    /// Longitude in 1e-7 degrees, within ±[`MAX_LONGITUDE_E7`].
    pub longitude_e7: i32,
    /// Radius of 68 % confidence in decimetres.
    pub accuracy_dm: Option<u32>,
    /// Height above the ellipsoid in decimetres.
    pub altitude_dm: Option<i32>,
    /// Speed over ground in centimetres per second.
    pub speed_cm_per_s: Option<u32>,
    /// Course over ground in tenths of a degree, below [`COURSE_CIRCLE_DDEG`].
    pub course_ddeg: Option<u16>,
    /// Heading in degrees, below [`HEADING_CIRCLE_DEG`].
    pub heading_deg: Option<u16>,
    /// Charge in percent, at most 100.
    pub battery_percent: Option<u8>,
    /// Where the position came from.
    pub source: Source,
}

impl Ping {
    /// A ping that says when and where and no more.
    #[must_use]
    pub fn at(seq: u64, time_ms: u64, latitude_e7: i32, longitude_e7: i32) -> Self {
        Self {
            seq,
            time_ms,
            latitude_e7,
            longitude_e7,
            accuracy_dm: None,
            altitude_dm: None,
            speed_cm_per_s: None,
            course_ddeg: None,
            heading_deg: None,
            battery_percent: None,
            source: Source::Unspecified,
        }
    }

    /// Whether the position was really fixed at `time_ms`, not repeated from before.
    #[must_use]
    pub fn is_fix(&self) -> bool {
        self.source != Source::LastKnown
    }

    /// Metres between this position and another on the mean sphere: the equirectangular
    /// approximation, within 0.5 % below 100 km, which is far more than a thinning rule compares.
    #[must_use]
    pub fn distance_m(&self, latitude_e7: i32, longitude_e7: i32) -> f64 {
        let degrees = |e7: i32| f64::from(e7) * 1e-7;
        let mut east = degrees(self.longitude_e7) - degrees(longitude_e7);
        if east.abs() > 180.0 {
            east -= 360.0_f64.copysign(east);
        }
        let north = degrees(self.latitude_e7) - degrees(latitude_e7);
        let middle = (degrees(self.latitude_e7) + degrees(latitude_e7)) / 2.0;
        let east = east * middle.to_radians().cos();
        north.hypot(east).to_radians() * MEAN_EARTH_RADIUS_M
    }
}

/// 90 degrees.
pub const MAX_LATITUDE_E7: i32 = 900_000_000;
/// 180 degrees.
pub const MAX_LONGITUDE_E7: i32 = 1_800_000_000;
/// A full circle in the unit of [`Ping::course_ddeg`].
pub const COURSE_CIRCLE_DDEG: u16 = 3_600;
/// A full circle in the unit of [`Ping::heading_deg`].
pub const HEADING_CIRCLE_DEG: u16 = 360;
/// The arithmetic mean radius R1 of the WGS 84 ellipsoid (Moritz, Geodetic Reference System 1980).
const MEAN_EARTH_RADIUS_M: f64 = 6_371_008.8;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(latitude_e7: i32, longitude_e7: i32) -> Ping {
        Ping::at(1, 0, latitude_e7, longitude_e7)
    }

    #[test]
    fn distances_are_those_of_the_mean_sphere() {
        let one_degree_m = MEAN_EARTH_RADIUS_M.to_radians();
        for (from, to, metres) in [
            ((0, 0), (0, 0), 0.0),
            ((0, 0), (10_000_000, 0), one_degree_m),
            ((0, 0), (0, 10_000_000), one_degree_m),
            (
                (600_000_000, 0),
                (600_000_000, 10_000_000),
                one_degree_m / 2.0,
            ),
            ((0, 1_799_000_000), (0, -1_799_000_000), one_degree_m / 5.0),
        ] {
            let found = at(from.0, from.1).distance_m(to.0, to.1);
            assert!(
                (found - metres).abs() < 0.01,
                "{from:?} to {to:?}: {found} is not {metres}"
            );
        }
    }
}
