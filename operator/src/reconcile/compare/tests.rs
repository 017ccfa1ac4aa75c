use super::*;
use proptest::prelude::*;

const LIMITS: AnswerLimits = AnswerLimits {
    failed_percent: Some(1),
    slower_percent: Some(30),
    window: Duration::from_mins(10),
};

fn figures(revision: &str, failed: i64, answers: i64, micros: [i64; 2]) -> RevisionFigures {
    let times = |average_micros: i64| TimeFigures {
        answers: answers - failed,
        average_micros,
        deviation_micros: average_micros / 2,
    };
    RevisionFigures {
        revision: revision.to_owned(),
        answers,
        failed,
        first_token: times(micros[0]),
        between_tokens: times(micros[1]),
    }
}

fn compared(old: RevisionFigures, new: RevisionFigures) -> RevisionComparison {
    RevisionComparison {
        time: Time(Timestamp::UNIX_EPOCH),
        old,
        new,
    }
}

const USUAL: [i64; 2] = [200_000, 20_000];

#[test]
fn more_failures_than_allowed_are_told_with_numbers() {
    for (old, new, is_worse) in [
        ((0, 233), (12, 240), true),
        // Too few to tell, however bad.
        ((0, 233), (3, 3), false),
        ((0, 233), (49, 49), false),
        ((0, 233), (50, 50), true),
        // Chance.
        ((0, 233), (1, 50), false),
        ((0, 233), (3, 240), false),
        ((0, 233), (20, 2000), false),
        ((0, 233), (40, 2000), true),
        // No worse than before.
        ((30, 300), (30, 300), false),
        ((300, 300), (30, 300), false),
        ((30, 300), (90, 300), true),
        // Of the old one too little is known.
        ((3, 3), (12, 240), true),
        ((0, 0), (12, 240), true),
        ((0, 0), (0, 240), false),
    ] {
        let old = figures("6c9f", old.0, old.1, USUAL);
        let new = figures("7d21", new.0, new.1, USUAL);
        let found = worse(&compared(old.clone(), new.clone()), &LIMITS);
        assert_eq!(found.is_some(), is_worse, "{old:?} {new:?}: {found:?}");
    }
    let both = compared(
        figures("6c9f", 0, 233, USUAL),
        figures("7d21", 12, 240, USUAL),
    );
    let (reason, message) = worse(&both, &LIMITS).expect("worse");
    assert_eq!(reason, Reason::ErrorRateExceeded);
    assert_eq!(
        message,
        "revision 7d21 failed 12 of 240 answers (5.0 %), 6c9f 0 of 233 (0.0 %); the limit is 1 % \
         more (spec.rollout.rollbackOn.errorRatePercent)"
    );
    let blind = AnswerLimits {
        failed_percent: None,
        ..LIMITS
    };
    assert_eq!(worse(&both, &blind), None);
}

#[test]
fn longer_times_than_allowed_are_told_with_numbers() {
    for (old, new, is_worse) in [
        ((200, 20), (300, 20), true),
        ((200, 20), (200, 30), true),
        ((200, 20), (250, 25), false),
        // Within what answers differ.
        ((200, 20), (265, 20), false),
        // Faster, and nothing to compare with.
        ((200, 20), (50, 5), false),
        ((0, 0), (300, 20), false),
    ] {
        let times = |(first, between): (i64, i64)| [first * 1000, between * 1000];
        let old = figures("6c9f", 0, 240, times(old));
        let new = figures("7d21", 0, 240, times(new));
        let found = worse(&compared(old, new.clone()), &LIMITS);
        assert_eq!(found.is_some(), is_worse, "{new:?}: {found:?}");
    }
    let slow = figures("7d21", 0, 240, [300_000, 20_000]);
    let few = figures("6c9f", 0, 49, USUAL);
    assert_eq!(worse(&compared(few, slow.clone()), &LIMITS), None);
    let usual = figures("6c9f", 0, 233, USUAL);
    let (reason, message) = worse(&compared(usual, slow), &LIMITS).expect("worse");
    assert_eq!(reason, Reason::LatencyRegression);
    assert_eq!(
        message,
        "revision 7d21 takes 300.0 ms to the first token on average of 240 answers, 6c9f 200.0 ms \
         of 233: 50 % more; the limit is 30 % (spec.rollout.rollbackOn.latencyRegressionPercent)"
    );
}

#[test]
fn what_the_old_revision_told_is_remembered_while_its_groups_end() {
    let of = |failed, answers| figures("6c9f", failed, answers, USUAL);
    let before = of(2, 300);
    assert_eq!(remembered(None, of(0, 0)), of(0, 0));
    assert_eq!(remembered(Some(&before), of(0, 0)), before);
    assert_eq!(remembered(Some(&before), of(0, 49)), before);
    assert_eq!(remembered(Some(&before), of(1, 50)), of(1, 50));
    assert_eq!(remembered(Some(&of(0, 3)), of(0, 4)), of(0, 4));
}

proptest! {
    /// A revision that is as the old one is never given up, and one that fails more is not
    /// the better for it.
    #[test]
    fn more_failures_are_never_better(
        (answers, failed) in (1_i64..5000).prop_flat_map(|answers| (Just(answers), 0..answers)),
        old in 0_i64..5000,
    ) {
        let of = |revision, failed| figures(revision, failed, answers, USUAL);
        prop_assert_eq!(worse(&compared(of("a", failed), of("b", failed)), &LIMITS), None);
        let old = figures("a", 0, old, USUAL);
        let less = worse(&compared(old.clone(), of("b", failed)), &LIMITS);
        let more = worse(&compared(old, of("b", failed + 1)), &LIMITS);
        prop_assert!(less.is_none() || more.is_some());
    }
}
