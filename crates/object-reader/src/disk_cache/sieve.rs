//! Decides which slot to evict: SIEVE, with a probation for the chunks of sequential readers. Pure.
//!
//! SIEVE (Zhang et al., NSDI 2024) keeps the slots in the order of their insertion. A hand moves
//! from the oldest to the newest one. It clears the mark of slots that were used since its last
//! visit, and evicts the first one without a mark.
//!
//! A sequential reader would push everything out that isn't used within one turn of the hand. Its
//! chunks therefore enter another list, first in, first out, which takes from the others only a
//! tenth of all slots. Those that are used before they leave it join the others.

/// Part of the slots that sequential readers take from others: one of so many.
const PROBATION_SHARE: usize = 10;
/// Link to no slot.
const NONE: u32 = u32::MAX;

/// State of a slot that isn't in a list.
const OUTSIDE: u8 = 0;
/// The slot is in the main list, or on probation.
const MAIN: u8 = 1;
const PROBATION: u8 = 2;
/// The slot was used.
const VISITED: u8 = 4;

/// Slots in the order of their eviction. Takes 9 bytes per slot.
#[derive(Debug)]
pub(super) struct Sieve {
    links: Vec<Links>,
    states: Vec<u8>,
    main: List,
    probation: List,
    /// Next slot of the main list to look at; `NONE` for the oldest one.
    hand: u32,
    /// Number of slots on probation that are evicted only if there are no others.
    probation_limit: usize,
}

#[derive(Debug, Clone, Copy)]
struct Links {
    newer: u32,
    older: u32,
}

#[derive(Debug, Clone, Copy)]
struct List {
    newest: u32,
    oldest: u32,
    len: usize,
}

impl List {
    const EMPTY: Self = Self { newest: NONE, oldest: NONE, len: 0 };
}

impl Sieve {
    /// Creates empty lists for the slots below `slots`.
    pub(super) fn new(slots: u32) -> Self {
        let slots = to_usize(slots);
        Self {
            links: vec![Links { newer: NONE, older: NONE }; slots],
            states: vec![OUTSIDE; slots],
            main: List::EMPTY,
            probation: List::EMPTY,
            hand: NONE,
            probation_limit: (slots / PROBATION_SHARE).max(1),
        }
    }

    /// Returns the memory in use, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.links.capacity() * size_of::<Links>() + self.states.capacity()
    }

    /// Adds a slot as the newest one. One of a sequential reader is on probation.
    pub(super) fn insert(&mut self, slot: u32, is_sequential: bool) {
        self.remove(slot);
        self.link(slot, if is_sequential { PROBATION } else { MAIN });
    }

    /// Takes note of a use of a slot.
    pub(super) fn visit(&mut self, slot: u32) {
        if let Some(state) = self.states.get_mut(to_usize(slot)) {
            *state |= VISITED;
        }
    }

    /// Removes a slot, if it is in a list.
    pub(super) fn remove(&mut self, slot: u32) {
        let state = self.state(slot);
        let (list, links) = (state & !VISITED, self.links(slot));
        if list != OUTSIDE {
            if self.hand == slot {
                self.hand = links.newer;
            }
            match links.newer {
                NONE => self.list(list).newest = links.older,
                newer => self.set_older(newer, links.older),
            }
            match links.older {
                NONE => self.list(list).oldest = links.newer,
                older => self.set_newer(older, links.newer),
            }
            self.list(list).len -= 1;
        }
        self.set_state(slot, OUTSIDE);
    }

    /// Chooses a slot to evict, and removes it. Slots for which `is_pinned` returns true stay.
    pub(super) fn evict(&mut self, is_pinned: impl Fn(u32) -> bool) -> Option<u32> {
        // In two turns everything is unmarked and has been looked at.
        for _ in 0..2 * (self.main.len + self.probation.len) {
            let is_over = self.probation.len > self.probation_limit;
            if is_over || self.main.len == 0 {
                let slot = self.probation.oldest;
                let is_visited = self.state(slot) & VISITED != 0;
                if !is_visited && !is_pinned(slot) {
                    self.remove(slot);
                    return Some(slot);
                }
                self.remove(slot);
                self.link(slot, if is_visited { MAIN } else { PROBATION });
            } else {
                let slot = if self.hand == NONE { self.main.oldest } else { self.hand };
                let is_visited = self.state(slot) & VISITED != 0;
                self.hand = self.links(slot).newer;
                if !is_visited && !is_pinned(slot) {
                    self.remove(slot);
                    return Some(slot);
                }
                self.set_state(slot, MAIN);
            }
        }
        None
    }

    fn link(&mut self, slot: u32, list: u8) {
        let newest = self.list(list).newest;
        if let Some(links) = self.links.get_mut(to_usize(slot)) {
            *links = Links { newer: NONE, older: newest };
            self.set_state(slot, list);
            match newest {
                NONE => self.list(list).oldest = slot,
                newest => self.set_newer(newest, slot),
            }
            self.list(list).newest = slot;
            self.list(list).len += 1;
        }
    }

    fn list(&mut self, list: u8) -> &mut List {
        if list == PROBATION { &mut self.probation } else { &mut self.main }
    }

    fn state(&self, slot: u32) -> u8 {
        self.states.get(to_usize(slot)).copied().unwrap_or(OUTSIDE)
    }

    fn set_state(&mut self, slot: u32, value: u8) {
        if let Some(state) = self.states.get_mut(to_usize(slot)) {
            *state = value;
        }
    }

    fn links(&self, slot: u32) -> Links {
        let none = Links { newer: NONE, older: NONE };
        self.links.get(to_usize(slot)).copied().unwrap_or(none)
    }

    fn set_newer(&mut self, slot: u32, newer: u32) {
        if let Some(links) = self.links.get_mut(to_usize(slot)) {
            links.newer = newer;
        }
    }

    fn set_older(&mut self, slot: u32, older: u32) {
        if let Some(links) = self.links.get_mut(to_usize(slot)) {
            links.older = older;
        }
    }
}

fn to_usize(slot: u32) -> usize {
    usize::try_from(slot).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// The same policy with vectors, oldest slots first.
    #[derive(Debug, Default)]
    struct Model {
        main: Vec<u32>,
        probation: Vec<u32>,
        visited: HashSet<u32>,
        /// Slots that the hand has passed in this turn.
        passed: usize,
        limit: usize,
    }

    impl Model {
        fn remove(&mut self, slot: u32) {
            self.visited.remove(&slot);
            self.probation.retain(|other| *other != slot);
            if let Some(place) = self.main.iter().position(|other| *other == slot) {
                self.main.remove(place);
                self.passed -= usize::from(place < self.passed);
            }
        }

        fn insert(&mut self, slot: u32, is_sequential: bool) {
            // A turn ends before the slots that are inserted later.
            if self.passed == self.main.len() {
                self.passed = 0;
            }
            if is_sequential { &mut self.probation } else { &mut self.main }.push(slot);
        }

        fn evict(&mut self, pinned: &HashSet<u32>) -> Option<u32> {
            for _ in 0..2 * (self.main.len() + self.probation.len()) {
                if self.probation.len() > self.limit || self.main.is_empty() {
                    let slot = self.probation[0];
                    let is_visited = self.visited.contains(&slot);
                    self.remove(slot);
                    if !is_visited && !pinned.contains(&slot) {
                        return Some(slot);
                    }
                    self.insert(slot, !is_visited);
                } else {
                    if self.passed >= self.main.len() {
                        self.passed = 0;
                    }
                    let slot = self.main[self.passed];
                    if !self.visited.contains(&slot) && !pinned.contains(&slot) {
                        self.remove(slot);
                        return Some(slot);
                    }
                    self.visited.remove(&slot);
                    self.passed += 1;
                }
            }
            None
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u32, bool),
        Visit(u32),
        Remove(u32),
        Evict(HashSet<u32>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let slots = 0_u32..30;
        let step = prop_oneof![
            4 => (slots.clone(), any::<bool>()).prop_map(|(slot, is)| Step::Insert(slot, is)),
            3 => slots.clone().prop_map(Step::Visit),
            1 => slots.clone().prop_map(Step::Remove),
            3 => prop::collection::hash_set(slots, 0..3).prop_map(Step::Evict),
        ];
        prop::collection::vec(step, 0..300)
    }

    proptest! {
        #[test]
        fn the_same_slots_are_evicted_as_by_the_model(steps in steps()) {
            let mut sieve = Sieve::new(30);
            let mut model = Model { limit: 3, ..Model::default() };
            let mut inside = HashSet::new();
            for step in steps {
                match step {
                    Step::Insert(slot, is_sequential) => {
                        if inside.insert(slot) {
                            sieve.insert(slot, is_sequential);
                            model.insert(slot, is_sequential);
                        }
                    }
                    Step::Visit(slot) => {
                        if inside.contains(&slot) {
                            sieve.visit(slot);
                            model.visited.insert(slot);
                        }
                    }
                    Step::Remove(slot) => {
                        inside.remove(&slot);
                        sieve.remove(slot);
                        model.remove(slot);
                    }
                    Step::Evict(pinned) => {
                        let evicted = sieve.evict(|slot| pinned.contains(&slot));
                        prop_assert_eq!(evicted, model.evict(&pinned));
                        evicted.map(|slot| inside.remove(&slot));
                    }
                }
                prop_assert_eq!(sieve.main.len, model.main.len());
                prop_assert_eq!(sieve.probation.len, model.probation.len());
                prop_assert_eq!(inside.len(), model.main.len() + model.probation.len());
            }
            // Everything can be evicted in the end.
            for _ in 0..inside.len() {
                prop_assert!(sieve.evict(|_| false).is_some_and(|slot| inside.remove(&slot)));
            }
            prop_assert_eq!(sieve.evict(|_| false), None);
        }
    }

    /// Returns how many of 40 slots that were used again, and of 60 that weren't, are left after
    /// 5,000 other chunks.
    fn left_after_a_scan(is_sequential: bool) -> (usize, usize) {
        let mut sieve = Sieve::new(100);
        (0..100).for_each(|slot| sieve.insert(slot, false));
        (0..40).for_each(|slot| sieve.visit(slot));
        let mut left: HashSet<_> = (0..100).collect();
        for _ in 0..5000 {
            let slot = sieve.evict(|_| false).unwrap();
            left.remove(&slot);
            sieve.insert(slot, is_sequential);
        }
        let hot = left.iter().filter(|slot| **slot < 40).count();
        (hot, left.len() - hot)
    }

    #[test]
    fn a_sequential_reader_takes_a_tenth() {
        // A tenth, and the slot that is being replaced.
        assert_eq!(left_after_a_scan(true), (40, 49));
        assert_eq!(left_after_a_scan(false), (40, 0));
    }

    #[test]
    fn what_is_scanned_twice_replaces_what_is_not_used() {
        let mut sieve = Sieve::new(100);
        (0..100).for_each(|slot| sieve.insert(slot, false));
        let mut scanned = Vec::new();
        for _ in 0..400 {
            let slot = sieve.evict(|_| false).unwrap();
            scanned.retain(|other| *other != slot);
            sieve.insert(slot, true);
            sieve.visit(slot);
            scanned.push(slot);
        }
        assert_eq!(scanned.len(), 100);
    }
}
