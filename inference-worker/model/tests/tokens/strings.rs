//! Strings that both sides make: these tests and `reference.py`, which tells what
//! Meta's reference makes of them. Both files say the same, line for line.

const SPACES: [&str; 15] = [
    " ", " ", " ", "\n", "\n", "\r", "\t", "\r\n", "\u{a0}", "\u{2003}", "\u{3000}", "\u{85}",
    "\u{b}", "\u{1c}", "\u{2028}",
];
const ENDINGS: [&str; 12] = [
    "'s",
    "'S",
    "'t",
    "'re",
    "'VE",
    "'ll",
    "'Ll",
    "'D",
    "'m",
    "\u{2019}s",
    "'\u{17f}",
    "'",
];
const DIGITS: [u32; 6] = [0x30, 0x30, 0x30, 0x660, 0x966, 0xFF10];
const OTHER_NUMBERS: [&str; 5] = ["\u{b2}", "\u{bd}", "\u{2167}", "\u{3220}", "\u{bf0}"];
const LETTERS: &str = "abcxyzABCXYZ\u{e4}\u{df}\u{c9}\u{1c5}\u{2b0}\u{131}\u{130}\u{434}\u{416}\u{3a3}\u{3c2}\u{4e2d}\u{5d0}\u{e01}\u{212a}";
const BLOCKS: [(u32, u32); 14] = [
    (0x20, 0x7F),
    (0xA0, 0x180),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xA00),
    (0xE00, 0xE80),
    (0x1100, 0x1200),
    (0x2000, 0x2070),
    (0x20A0, 0x2200),
    (0x3040, 0x3100),
    (0x4E00, 0x5200),
    (0xAC00, 0xAD00),
    (0xFE00, 0xFF00),
    (0x1F300, 0x1F700),
];
const PUNCTUATION: &str = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u{2026}\u{2014}\u{ab}\u{3002}";
/// Control tokens of Llama 3 that its tokenizer.json has as well.
pub(crate) const LLAMA3_CONTROL: [&str; 6] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
];
pub(crate) const LLAMA4_CONTROL: [&str; 11] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|eom|>",
    "<|python_start|>",
    "<|image|>",
    "<|patch|>",
    "<|reasoning_thinking_start|>",
    "<|reserved_special_token_0|>",
];
const BROKEN: [&str; 6] = ["<|eot", "|>", "<|", "<|end_of_text|", "<|eot_id |>", "<||>"];
const EMOJI: [&str; 5] = [
    "\u{1f469}\u{200d}\u{1f469}\u{200d}\u{1f467}",
    "\u{1f3f3}\u{fe0f}\u{200d}\u{1f308}",
    "\u{1f44d}\u{1f3fd}",
    "\u{1f1e9}\u{1f1ea}",
    "\u{2764}\u{fe0f}",
];

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, count: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let z = z ^ (z >> 31);
        u32::try_from(((z >> 32) * u64::from(count)) >> 32).expect("is below count")
    }

    fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(u32::try_from(items.len()).expect("few")) as usize]
    }

    fn letter(&mut self, letters: &str) -> char {
        let letters: Vec<char> = letters.chars().collect();
        letters[self.below(u32::try_from(letters.len()).expect("few")) as usize]
    }
}

/// What strings are made of.
pub(crate) struct Source<'a> {
    /// Bytes of the tokens that are no control tokens.
    pub(crate) vocabulary: Vec<&'a [u8]>,
    pub(crate) control: &'static [&'static str],
}

impl Source<'_> {
    /// Tokens of the vocabulary that are text by themselves.
    fn words(&self, random: &mut Random, most: u32) -> String {
        let mut out = String::new();
        for _ in 0..=random.below(most) {
            let token = random.pick(&self.vocabulary);
            out += std::str::from_utf8(token).unwrap_or("");
        }
        out
    }

    fn part(&self, random: &mut Random) -> String {
        let point = |point| char::from_u32(point).expect("no surrogate");
        let kind = random.below(11);
        if kind < 2 {
            return self.words(random, 1 + 4 * kind);
        }
        let times = 0..=random.below(8);
        match kind {
            2 => times.map(|_| random.pick(&SPACES)).collect(),
            3 => {
                let zero = DIGITS[random.below(6) as usize];
                let mut digits: String = times.map(|_| point(zero + random.below(10))).collect();
                if random.below(4) == 0 {
                    digits += random.pick(&OTHER_NUMBERS);
                }
                digits
            }
            4 => self.words(random, 1) + random.pick(&ENDINGS),
            5 => {
                let (start, end) = BLOCKS[random.below(14) as usize];
                times
                    .map(|_| point(start + random.below(end - start)))
                    .collect()
            }
            6 => times
                .map(|_| match random.below(0x11_0000 - 0x800) {
                    high @ 0xD800.. => point(high + 0x800),
                    low => point(low),
                })
                .collect(),
            7 => {
                let marks: String = times.map(|_| random.letter(PUNCTUATION)).collect();
                marks + random.pick(&["", "\n", "/\n", "\r\n\n"])
            }
            8 if random.below(3) > 0 => random.pick(self.control).to_owned(),
            8 => random.pick(&BROKEN).to_owned(),
            9 => {
                let marks: String = times.map(|_| point(0x300 + random.below(0x70))).collect();
                if random.below(2) > 0 {
                    random.pick(&EMOJI).to_owned()
                } else {
                    format!("{}{marks}", random.letter(LETTERS))
                }
            }
            _ => times.map(|_| random.letter(LETTERS)).collect(),
        }
    }

    /// The string of this number.
    pub(crate) fn string(&self, number: u64) -> String {
        let mut random = Random(number);
        (0..=random.below(10))
            .map(|_| self.part(&mut random))
            .collect()
    }
}

/// Where hashes begin.
pub(crate) const FNV: u64 = 0xCBF2_9CE4_8422_2325;

/// FNV-1a.
pub(crate) fn fnv(data: impl IntoIterator<Item = u8>, value: u64) -> u64 {
    data.into_iter().fold(value, |value, byte| {
        (value ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    })
}
