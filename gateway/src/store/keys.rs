//! The keys of the store: their bytes order as their fields do, so that a scan meets a user's devices,
//! a device's epochs and an epoch's runs in order.
//!
//! Knows the layout of keys and the names of column families. Must not know values or RocksDB.

use std::fmt;

use waypost_proto::id::{DeviceId, UserId};

/// A day in UTC, counted from 1970-01-01; the day on which pings were *received*, so that late uploads
/// do not scatter over families that are about to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day(u32);

/// The key of one row of pings: a run of one batch that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PingKey {
    /// Whose pings.
    pub device: DeviceId,
    /// The epoch of their sequence numbers.
    pub epoch: u32,
    /// The sequence number of the first of them. No other row of the device and epoch has it, because
    /// each sequence number is stored once.
    pub first_seq: u64,
}

/// How long a device's key is.
pub(super) const DEVICE_KEY_BYTES: usize = size_of::<[u8; 16]>() + size_of::<u32>();
/// How long the key of a row of pings is.
pub(super) const PING_KEY_BYTES: usize = DEVICE_KEY_BYTES + size_of::<u32>() + size_of::<u64>();

// The layout on disk: a change here makes every store unreadable, so it must not go unnoticed.
const _: () = assert!(DEVICE_KEY_BYTES == 20);
const _: () = assert!(PING_KEY_BYTES == 32);
const _: () = assert!(size_of::<UserId>() == 16);

/// What the name of a day's family begins with.
const DAY_FAMILY_PREFIX: &str = "pings-";
const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// From 0000-03-01, where a 400-year cycle of the calendar begins, to 1970-01-01.
const DAYS_BEFORE_1970: u64 = 719_468;
const DAYS_IN_400_YEARS: u64 = 146_097;

impl Day {
    /// The day that holds a moment, given in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn of_ms(ms: u64) -> Self {
        // Eleven million years fit; the last day stands for all after it.
        Self(u32::try_from(ms / DAY_MS).unwrap_or(u32::MAX))
    }

    /// The day after.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The day before; of the first there is, itself.
    #[must_use]
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    /// When it begins, in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn start_ms(self) -> u64 {
        u64::from(self.0) * DAY_MS
    }

    /// Reads the form that `Display` writes, and only that.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '-').map(|part| part.parse::<u64>().ok());
        let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        let found = Self(u32::try_from(days_since_1970(year, month, day)?).ok()?);
        // 2026-02-30 and 2026-2-3 are not how any day is written.
        (found.to_string() == text).then_some(found)
    }

    pub(super) fn family_name(self) -> String {
        format!("{DAY_FAMILY_PREFIX}{self}")
    }

    pub(super) fn of_family_name(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix(DAY_FAMILY_PREFIX)?)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = calendar(u64::from(self.0));
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl PingKey {
    pub(super) fn to_bytes(self) -> [u8; PING_KEY_BYTES] {
        let mut bytes = [0; PING_KEY_BYTES];
        let (device, rest) = bytes.split_at_mut(DEVICE_KEY_BYTES);
        let (epoch, first_seq) = rest.split_at_mut(size_of::<u32>());
        device.copy_from_slice(&device_key(&self.device));
        epoch.copy_from_slice(&self.epoch.to_be_bytes());
        first_seq.copy_from_slice(&self.first_seq.to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (device, rest) = bytes.split_at_checked(DEVICE_KEY_BYTES)?;
        let (epoch, first_seq) = rest.split_first_chunk()?;
        Some(Self {
            device: device_of_key(device)?,
            epoch: u32::from_be_bytes(*epoch),
            first_seq: u64::from_be_bytes(first_seq.try_into().ok()?),
        })
    }
}

/// Where the rows of a user begin in the families whose keys begin with the user, and the first key after them.
pub(super) fn user_range(user: UserId) -> (Vec<u8>, Vec<u8>) {
    let next = u128::from_be_bytes(user.0).checked_add(1);
    let end = match next {
        Some(next) => next.to_be_bytes().to_vec(),
        // Of the last user there is: longer than every key, and no key is greater.
        None => vec![0xff; PING_KEY_BYTES + 1],
    };
    (user.0.to_vec(), end)
}

pub(super) fn device_key(id: &DeviceId) -> [u8; DEVICE_KEY_BYTES] {
    let mut bytes = [0; DEVICE_KEY_BYTES];
    let (user, device) = bytes.split_at_mut(id.user.0.len());
    user.copy_from_slice(&id.user.0);
    device.copy_from_slice(&id.device.to_be_bytes());
    bytes
}

pub(super) fn device_of_key(bytes: &[u8]) -> Option<DeviceId> {
    let (user, device) = bytes.split_first_chunk()?;
    Some(DeviceId {
        user: UserId(*user),
        device: u32::from_be_bytes(device.try_into().ok()?),
    })
}

/// Year, month and day of a number of days since 1970-01-01 (Howard Hinnant, "chrono-Compatible
/// Low-Level Date Algorithms": years begin in March, so that the leap day is their last).
fn calendar(days_since_1970: u64) -> (u64, u64, u64) {
    let days = days_since_1970 + DAYS_BEFORE_1970;
    let (cycle, day_of_cycle) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
        - day_of_cycle / 146_096)
        / 365;
    let day_of_year =
        day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (
        cycle * 400 + year_of_cycle + u64::from(month <= 2),
        month,
        day,
    )
}

/// The inverse of [`calendar`]; `None` before 1970.
fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    let year = year.checked_sub(u64::from(month <= 2))?;
    let (cycle, year_of_cycle) = (year / 400, year % 400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_cycle = 365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100 + day_of_year;
    cycle
        .checked_mul(DAYS_IN_400_YEARS)?
        .checked_add(day_of_cycle)?
        .checked_sub(DAYS_BEFORE_1970)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device() -> impl Strategy<Value = DeviceId> {
        // Two users that differ in their last byte only, so that ties are common.
        let user = prop_oneof![
            any::<[u8; 16]>(),
            Just([7; 16]),
            Just([[7; 15].as_slice(), &[8]].concat().try_into().unwrap())
        ];
        (user, prop_oneof![any::<u32>(), 0..3_u32]).prop_map(|(user, device)| DeviceId {
            user: UserId(user),
            device,
        })
    }

    fn key() -> impl Strategy<Value = PingKey> {
        (
            device(),
            prop_oneof![any::<u32>(), 0..3_u32],
            prop_oneof![any::<u64>(), 0..300_u64],
        )
            .prop_map(|(device, epoch, first_seq)| PingKey {
                device,
                epoch,
                first_seq,
            })
    }

    proptest! {
        #[test]
        fn bytes_order_as_fields_do(a in key(), b in key()) {
            prop_assert_eq!(a.to_bytes().cmp(&b.to_bytes()), a.cmp(&b));
            prop_assert_eq!(device_key(&a.device).cmp(&device_key(&b.device)), a.device.cmp(&b.device));
        }

        #[test]
        fn keys_round_trip(key in key()) {
            prop_assert_eq!(PingKey::from_bytes(&key.to_bytes()), Some(key));
            prop_assert_eq!(device_of_key(&device_key(&key.device)), Some(key.device));
        }

        #[test]
        fn the_rows_of_a_user_and_no_others_are_in_its_range(a in key(), b in key()) {
            let (first, end) = user_range(a.device.user);
            let is_within = |key: &[u8]| first.as_slice() <= key && key < end.as_slice();
            let is_same = a.device.user == b.device.user;
            prop_assert_eq!(is_within(&b.to_bytes()), is_same);
            prop_assert_eq!(is_within(&device_key(&b.device)), is_same);
        }

        #[test]
        fn keys_of_another_length_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(PingKey::from_bytes(&bytes).is_some(), bytes.len() == PING_KEY_BYTES);
            prop_assert_eq!(device_of_key(&bytes).is_some(), bytes.len() == DEVICE_KEY_BYTES);
        }

        #[test]
        fn days_round_trip_in_calendar_order(number in any::<u32>()) {
            let day = Day(number);
            prop_assert_eq!(Day::of_family_name(&day.family_name()), Some(day));
            let (year, month, date) = calendar(u64::from(number));
            prop_assert!((year, month, date) < calendar(u64::from(number) + 1));
        }

        #[test]
        fn no_other_text_is_a_day(text in "[0-9]{0,9}-[0-9]{0,3}-[0-9-]{0,3}") {
            if let Some(day) = Day::parse(&text) {
                prop_assert_eq!(day.to_string(), text);
            }
        }
    }

    #[test]
    fn known_days_are_written_as_people_do() {
        for (ms, text) in [
            (0, "1970-01-01"),
            (DAY_MS - 1, "1970-01-01"),
            (DAY_MS, "1970-01-02"),
            (951_782_400_000, "2000-02-29"),
            (1_641_168_000_000, "2022-01-03"),
            (4_107_456_000_000, "2100-02-28"),
            (4_107_542_400_000, "2100-03-01"),
        ] {
            assert_eq!(Day::of_ms(ms).to_string(), text);
            assert_eq!(Day::parse(text), Some(Day::of_ms(ms)));
        }
        for text in [
            "",
            "2026",
            "2026-13-01",
            "2026-02-30",
            "2026-2-03",
            "1969-12-31",
            "+2026-01-01",
            "2026-01-01-",
        ] {
            assert_eq!(Day::parse(text), None, "{text}");
        }
    }
}
