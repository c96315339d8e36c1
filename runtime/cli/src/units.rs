//! Sizes and durations as people and engines write them.

use std::time::Duration;

/// Bytes given as `1073741824`, `1024m`, `1G` or `1GiB`; powers of 1024 as runc has it.
pub(crate) fn bytes(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no size; write 536870912, 512M or 1.5G");
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = lower.get(digits.len()..).unwrap_or_default();
    let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = digits.parse::<i64>() {
        // -1 is "no limit" wherever it is one.
        let negative_unit = whole < 0 && (whole != -1 || shift != 0);
        return whole
            .checked_mul(1 << shift)
            .filter(|_| !negative_unit)
            .ok_or_else(wrong);
    }
    // A fraction: thousandths are precise enough, and integers stay exact.
    let (whole, part) = digits.split_once('.').ok_or_else(wrong)?;
    let part: String = format!("{part:0<3}").chars().take(3).collect();
    let (whole, part): (i64, i64) = (
        whole.parse().map_err(|_| wrong())?,
        part.parse().map_err(|_| wrong())?,
    );
    if whole < 0 || part < 0 {
        return Err(wrong());
    }
    whole
        .checked_mul(1000)
        .and_then(|n| n.checked_add(part))
        .and_then(|n| n.checked_mul(1 << shift))
        .map(|n| n / 1000)
        .ok_or_else(wrong)
}

/// Processors given as `2` or `1.5`, in thousandths.
pub(crate) fn cpus(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is no number of processors; write 2 or 0.5");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let part: String = format!("{part:0<3}").chars().take(3).collect();
    match (whole.parse::<u16>(), part.parse::<u16>()) {
        (Ok(whole), Ok(part)) if whole > 0 || part >= 10 => Ok(i64::from(whole) * 1000 + i64::from(part)),
        _ => Err(wrong()),
    }
}

/// A duration as Go writes it: `5s`, `500ms`, `1m30s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration; write 5s, 500ms or 1m30s");
    let mut left = text;
    let mut total = Duration::ZERO;
    while !left.is_empty() {
        let digits = left.len() - left.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, rest) = left.split_at(digits);
        let unit = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, rest) = rest.split_at(unit);
        let number: u32 = number.parse().map_err(|_| wrong())?;
        let one = match unit {
            "h" => Duration::from_secs(3600),
            "m" => Duration::from_secs(60),
            "s" => Duration::from_secs(1),
            "ms" => Duration::from_millis(1),
            _ => return Err(wrong()),
        };
        total = one
            .checked_mul(number)
            .and_then(|more| total.checked_add(more))
            .ok_or_else(wrong)?;
        left = rest;
    }
    match total.is_zero() {
        true => Err(wrong()),
        false => Ok(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", Some(0)),
            ("100", Some(100)),
            ("1k", Some(1024)),
            ("512M", Some(512 << 20)),
            ("1.5g", Some(1536 << 20)),
            ("1GiB", Some(1 << 30)),
            ("1gb", Some(1 << 30)),
            ("-1", Some(-1)),
            ("-1k", None),
            ("-2", None),
            ("", None),
            ("x", None),
            ("9223372036854775807k", None),
            ("1.", Some(1)),
            ("1.-5", None),
        ] {
            assert_eq!(bytes(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn processors() {
        for (text, want) in [
            ("2", Some(2000)),
            ("0.5", Some(500)),
            ("1.25", Some(1250)),
            ("0", None),
            ("-1", None),
            ("x", None),
        ] {
            assert_eq!(cpus(text).ok(), want, "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, want) in [
            ("5s", Some(5000)),
            ("500ms", Some(500)),
            ("1m30s", Some(90_000)),
            ("1h", Some(3_600_000)),
            ("0s", None),
            ("5", None),
            ("", None),
            ("s", None),
            ("5é", None),
            ("99999999999s", None),
        ] {
            assert_eq!(duration(text).ok(), want.map(Duration::from_millis), "{text}");
        }
    }
}
