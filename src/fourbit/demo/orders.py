"""The demo's data: sentences about an order, to be turned into JSON with a fixed schema.

The task is chosen so that a small model cannot do it untouched and learns it in minutes, and so
that learning it by heart does not help. The held-out rows share no word of a name, item or city
and no quantity with the training rows; the seven weekdays are the only values that both have.
Rows of `OrderData.new_patterns` also use sentence patterns that training never shows.

Half of the names, items and cities are invented from syllables. The shapes vary on purpose: a
model that sees a dozen place names memorises them instead of learning where a place stands.

Listed words and the beginnings of invented ones were chosen with the tokenizer of the demo's
model: nearly all are cut alike after a space and after the quote of a JSON string. The others,
" Bristol" (one token) and "Br|istol" (two), ask the model to know how a token is spelt; that was
most of what it got wrong, and it is not the skill that this demo teaches.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYSTEM = "Extract the order as JSON with customer, item, quantity, city, day."
KEYS = ("customer", "item", "quantity", "city", "day")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# A slot that ends in 2 holds a distractor: a value of the right kind that is not the answer.
TRAIN_PATTERNS = (
    "{name} wants {qty} {item} delivered to {city} on {day}.",
    "Please send {qty} {item} to {name} in {city}; {day} would be best.",
    "Order from {name}: {item}, {qty} of them, ship to {city} by {day}.",
    "Hi, {name} here. Could I get {qty} {item}? I live in {city} and I'm home on {day}.",
    "By {day} we need {qty} {item} at {name}'s place in {city}.",
    "{city}, {day}: drop off {qty} {item} for {name}.",
    "{name} from {city} ordered {qty} {item} for {day}.",
    "On {day}, {name} expects {qty} {item} in {city}.",
    "We owe {name} {qty} {item}; the truck reaches {city} on {day}.",
    "Ship {qty} {item} to {city}. Customer: {name}. Due {day}.",
    "{qty} {item} for {name}, {city}, {day}.",
    "Can you bring {qty} {item} to {city} this {day}? It's for {name}.",
    "{name} called: {qty} {item}, {city}, before {day}.",
    "For {name} in {city}: {qty} {item}, arriving {day}.",
    "I'm {name} and I'd like {qty} {item} sent to {city} by {day}, please.",
    "{day} delivery to {city}: {name} gets {qty} {item}.",
    "Our shop in {city} needs {qty} {item} on {day}. Regards, {name}",
    "Put {name} down for {qty} {item}, {day}, {city}.",
    "The {item} ({qty}) go to {name} in {city} on {day}.",
    "Customer {name}, city {city}: {qty} x {item}, {day}.",
    "{qty} {item}, please! {name}, {city}. Any time on {day}.",
    "To {city} on {day}: {item}, {qty} pieces, for {name}.",
    "How about {day} for the {qty} {item} {name} ordered to {city}?",
    "Send {name} the usual, {qty} {item}, in {city}, {day}.",
    "Deliver to: {name}, {city}. Goods: {qty} {item}. Day: {day}.",
    "We promised {name} that {qty} {item} reach {city} by {day}.",
    "I need {item}, {qty} in total, in {city} on {day}. Thanks, {name}",
    "If possible, ship {qty} {item} to {name} in {city} before {day}.",
    "{qty} {item} are going to {city} on {day}; {name} will sign for them.",
    "Please book {day} for {name}: {qty} {item} to {city}.",
    "{name} wants {qty} {item}, not {qty2}, in {city} on {day}.",
    "Not {qty2} but {qty} {item} for {name}, to {city} by {day}.",
    "{name} moved from {city2} to {city}; send the {qty} {item} there on {day}.",
    "Order {order}: {qty} {item} for {name}, {city}, {day}.",
    "Order no. {order} from {name}: {qty} {item} to {city} on {day}.",
    "{name} ({phone}) asks for {qty} {item} in {city} by {day}.",
    "{name2} took the call, but the {qty} {item} are for {name} in {city} on {day}.",
    "Change for {name} in {city}: {day} instead of {day2}, {qty} {item}.",
    "Last time {name} took {qty2} {item}; now it is {qty}, to {city}, on {day}.",
    "{name} no longer wants {item2}. Send {qty} {item} to {city} on {day}.",
    "Cancel {day2}. {name} in {city} gets the {qty} {item} on {day}.",
    "Not to {city2}, to {city}: {qty} {item} for {name} on {day}.",
    "{name2} asked us to send {name} {qty} {item} in {city} by {day}.",
    "It was ordered on {day2}: {qty} {item} for {name} in {city}, due {day}.",
    "{name} paid {qty2} dollars for {qty} {item}, due in {city} on {day}.",
    "Forget the {item2}: {name} in {city} needs {qty} {item} by {day}.",
    "Instead of {qty2}, make it {qty} {item} for {name}, {city}, {day}.",
    "Ticket {order}. {city}: {name} expects {qty} {item} on {day}.",
    "Our {city2} store ships {qty} {item} to {name} in {city} on {day}.",
    "Call {phone} when the {qty} {item} for {name} reach {city} on {day}.",
    "The {item} are for {name}, not {name2}: {qty} of them, {city}, {day}.",
    "The {qty} {item} for {name} leave {city2} and reach {city} by {day}.",
    "Today is {day2}; {name} in {city} wants {qty} {item} by {day}.",
    "Hello, this is {name2}. My colleague {name} in {city} needs {qty} {item} by {day}.",
    "{day} works, {day2} does not: {qty} {item} to {name}, {city}.",
    "{name2} cancelled, so {name} in {city} gets {qty} {item} on {day}.",
)

NEW_PATTERNS = (
    "{name} would love to receive {qty} {item} in {city} come {day}.",
    "Hey team, {qty} {item} must be at {name}'s door in {city} by {day}.",
    "Got a request from {city}: {name}, {qty} {item}, {day}.",
    "Pack {qty} {item} for {name} and have them in {city} on {day}.",
    "{day} is the deadline for {name}'s {qty} {item} in {city}.",
    "Is it okay if {name} picks up {qty} {item} in {city} on {day}?",
    "{name} changed the order to {qty} {item} rather than {qty2}: {city}, {day}.",
    "Invoice {order}: {name} of {city} bought {qty} {item}, wanted on {day}.",
    "{city} again, not {city2}. {name} needs {qty} {item} there by {day}.",
    "Someone named {name} in {city} asked for {qty} {item}; bring them {day}.",
    "Moved from {day2} to {day}: the {qty} {item} of {name} in {city}.",
    "After talking to {name2}, {name} settled on {qty} {item} for {city}, {day}.",
    "Leave the {item2} out. Just {qty} {item} to {name}, {city}, {day}.",
    "Good morning, {qty} {item} on {day}, please. I am {name}, writing from {city}.",
    "A van leaves for {city} on {day} with {qty} {item} that {name} bought.",
    "For {name}, {item}: {qty}. They go to {city}, and {day} is fine.",
)

FIRST_NAMES = _words(
    """
    Anna Ben Carla David Farid Jamal Kira Nils Olga Pavel Umar Xena Yusuf Zoe Aisha Chloe Gita
    Hana Kofi Lena Quentin Tomas Victor Wanda Yara Amir Dora Fatima Helga Imani Jonas Meera
    Petra Thea Yuki Zara Igor Alina Anika Arjun Astrid Aziz Benito Bianca Camila Damian Dario
    Daphne Elif Emil Enzo Fiona Gerda Gideon Gina Hamid Hanna Hector Hilda Ida Imran Ines Ingrid
    Isla Ismail Jana Jasper Javier Kenji Laila Leila Livia Lotte Lucia Lydia Magnus Malik Marta
    Matilda Mika Nikhil Odette Olaf Paolo Pilar Rania Renata Rika Salma Samira Sanjay Selma
    Shira Silas Simone Suresh Tariq Teo Tilda Tove Uma Wilma Xavier Yasmin Yolanda Zahra Zofia
    """
)
LAST_NAMES = _words(
    """
    Okafor Moreau Kowalski Haddad Ortiz Bauer Rossi Petrov Kim Mehta Horvat Marino Castillo Osei
    Kaya Nowak Olsen Hoang Sato Mbeki Acosta Akhtar Albrecht Almeida Andrade Aoki Aydin Bajwa
    Balogun Banerjee Barros Bianchi Brandt Cardoso Chaudhry Conti Delgado Demir Dvorak Eriksen
    Esposito Farouk Gallo Garza Hashimoto Herrera Hidalgo Ibarra Iqbal Jovanovic Kimura Lopes
    Marchetti Morales Navarro Okoye Ortega Osman Pacheco Pinto Qureshi Romano Saito Salazar
    Sandoval Schultz Serrano Takeda Thapa Uribe Vargas Vega Yilmaz Youssef
    """
)
NOUNS = _words(
    """
    apples chairs mugs brushes kettles ladders vases scarves sandals backpacks umbrellas
    chargers rakes seeds melons pretzels teapots frames whistles kites flutes staplers easels
    boxes filters gaskets wrenches pliers mops doorknobs anvils axes bagels beakers belts
    binders blinds bookends buttons cards chains clamps clips coins combs compasses cots cradles
    cupboards dryers flags flasks footballs funnels games globes grills harps headsets hoodies
    irons jugs juicers keychains knobs ladles lighters limes lockers masks mixers modems nets
    nuts oars padlocks pans parkas pitchers plums poles pots projectors racks razors sashes
    screens sheets shirts shutters skewers skillets skirts sofas spades spanners spindles spools
    stencils stockings tambourines thimbles ties timers toasters torches tripods trombones
    trowels tubs ukuleles unicycles vacuums vests violins waffles washers webcams wigs windmills
    yoyos zippers zithers
    """
)
MODIFIERS = _words(
    """
    blue green yellow purple grey small large plastic paper travel winter round heavy glass
    office red white black orange brown tiny long short thin thick wide square flat soft hard
    light dark clear canvas denim tin stone clay pine felt bath school fishing party baby modern
    double solar electric manual magnetic printed woven knitted oval plain bright teal amber
    beige
    """
)
CITIES = _words(
    """
    Paris Turin Boston Porto Hanoi London Osaka Rome Utrecht Valencia Zagreb Accra Doha Ghent
    Rabat Aachen Aarhus Alicante Almaty Amman Antwerp Asmara Astana Avignon Bari Beirut Belgrade
    Bordeaux Brno Bruges Busan Caracas Cartagena Casablanca Chicago Colombo Cusco Dakar Darwin
    Dortmund Durban Eindhoven Essen Evora Fargo Galway Gdansk Genoa Graz Guadalajara Haifa
    Harare Incheon Innsbruck Kigali Kobe Kuching Lausanne Leuven Linz Ljubljana Lucknow Maputo
    Marseille Minsk Mombasa Monaco Muscat Nantes Oxford Padua Palermo Pamplona Parma Pisa
    Plovdiv Recife Rostock Rotterdam Salerno Salzburg Sapporo Sendai Siena Skopje Stuttgart Suva
    Tampere Tashkent Toulouse Trieste Trondheim Uppsala Varna Verona Vigo Windhoek Yerevan
    Yokohama Zadar Zaragoza
    """
)
CITY_PREFIXES = _words(
    """
    New Port San Upper Fort Lake North Saint Mount Old East Little Grand West South Los Lower El
    Point Big Deep Far Great High Golden La Le Mont Rock Royal Silver Spring Sun Key
    """
)
REAL_WORDS = (FIRST_NAMES, LAST_NAMES, NOUNS, MODIFIERS, CITIES, CITY_PREFIXES)

# Invented words begin with one of these: see the module's docstring for the choice.
_NAME_OPENERS = _words(
    """
    baix ban beld bem boun brel brum bur cem cley clen clun con dais dear doon dou drel dren
    drur elm fand fis flan flar flou gia goun gres grum heer hean joun keel koun krol leam leem
    lild lol lun muld nai nel nian num pai plia plon plum poun quam quar quel quir rem run sem
    shum skim sku skul sond stel stia stom stum sum swil swol teld thal thel thon toom trea tril
    trir var veam vol vold wean weer wun zal zar zem zend zial
    """
)
_NOUN_OPENERS = _words(
    """
    ban band beem boun bram bres brum ceam cend clen clol clou cun dild dold door doun dral dren
    drou fean fen ferk fol flam flin flun gar gark gral gram grem herk hial hoon hul jan joor
    joul karn keel kim koul kren krim kroo krun laim lirk loon meam mou moum mun nand neam noum
    pam ploo plem plim poor poum quen quel quor rean rind rom serk shan shom sias skam skar skum
    skos stel stil stul swee swil swin taim thil thim thom tond toon tren trom vald veal vool
    wea weel woul zain zend zou
    """
)
_ONSETS = _words("b c d f g h j k l m n p r s t v w z br dr fl gr pl sh st th tr")
_VOWELS = _words("a a a e e e i i i o o o u u ai ea ee ia oo ou")
_CODAS = ("",) * 12 + _words("l m n r s ld nd sh st")
_LINKS = _words("l m n r s v d")
_NAME_ENDS = ("", "", *_words("a o i in ka el en is ara ine eth on us ette ius ya"))
_LAST_ENDS = ("", *_words("son sen ez ov ski man ini aux ley well wick sson era ova"))
_NOUN_ENDS = _words("s s s ers ets les ips ons ins oids ers ogs ums ixes ellas ards")
_CITY_ENDS = _words(
    "a o ia ona ano ville burg stad mouth holm ton ford bury grad field haven wick mere dale"
)
_BRAND_ENDS = ("", *_words("ex ora ix tek on io ano"))

# Syllables meet by chance; these would make an embarrassing customer.
_UNWANTED = _words("anus cum dild nazi negr nig pedo penis piss poop porn rape sex shit")
_TAKEN = frozenset(word.lower() for words in REAL_WORDS for word in words)
_HELD_OUT_SHARE = 4  # one value in four belongs to the held-out side
_QUANTITIES = range(2, 300)


@dataclass(frozen=True)
class OrderData:
    """One generated data set; each row is `{"prompt": sentence, "completion": JSON}`.

    Attributes:
        train: Rows to learn from.
        test: Rows in the training patterns with values that training never shows.
        new_patterns: Rows with such values in patterns that training never shows.
    """

    train: list[dict[str, str]]
    test: list[dict[str, str]]
    new_patterns: list[dict[str, str]]


class _Draws:
    """Seeded draws that stay the same on every platform and Python version.

    Python promises that for `Random.random` alone, so everything here is built on it.
    """

    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random

    def below(self, bound: int) -> int:
        return int(self._uniform() * bound)

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        result = list(options)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


class _Values:
    """Draws names, items, cities and quantities of one side, training or held-out.

    Listed words and quantities are divided by one shuffle for each list; an invented word belongs
    to the side that a hash of it names, so the two sides never need to know each other's draws.
    """

    def __init__(self, draws: _Draws, *, seed: int, held_out: bool) -> None:
        self._draws = draws
        self._seed = seed
        self._held_out = held_out
        # Both sides must see the same shuffles, whatever was drawn before.
        splitter = _Draws(seed)
        self._first, self._last, self._nouns, self._modifiers, self._cities, self._prefixes = (
            self._own_part(splitter.shuffled(words)) for words in REAL_WORDS
        )
        self._quantities = self._own_part(splitter.shuffled(_QUANTITIES))

    def _own_part(self, options: list[T]) -> list[T]:
        cut = len(options) // _HELD_OUT_SHARE
        return options[:cut] if self._held_out else options[cut:]

    def _invented(self, openers: Sequence[str], endings: Sequence[str]) -> str:
        """Return a lower-case word of this side made from syllables and one of the endings."""
        while True:
            ending = self._draws.pick(endings)
            stem = self._draws.pick(openers)
            if self._draws.chance(0.35):
                stem += "".join(self._draws.pick(part) for part in (_ONSETS, _VOWELS, _CODAS))
            # An ending that begins with a vowel follows a consonant, or nobody could read it.
            if ending[:1] in _VOWELS and stem[-1] in _VOWELS:
                stem += self._draws.pick(_LINKS)
            word = stem + ending
            if 5 <= len(word) <= 9 and self._owns(word):
                return word

    def _proper(self, endings: Sequence[str]) -> str:
        return self._invented(_NAME_OPENERS, endings).capitalize()

    def _owns(self, word: str) -> bool:
        if word in _TAKEN or any(part in word for part in _UNWANTED):
            return False
        digest = hashlib.sha256(f"{self._seed}:{word}".encode()).digest()
        return (digest[0] % _HELD_OUT_SHARE == 0) == self._held_out

    def name(self) -> str:
        real = self._draws.chance(0.5)
        first = self._draws.pick(self._first) if real else self._proper(_NAME_ENDS)
        if self._draws.chance(0.6):
            return first
        real = self._draws.chance(0.5)
        last = self._draws.pick(self._last) if real else self._proper(_LAST_ENDS)
        return f"{first} {last}"

    def item(self) -> str:
        noun = self._draws.pick(self._nouns)
        if self._draws.chance(0.5):
            noun = self._invented(_NOUN_OPENERS, _NOUN_ENDS)
        shape = self._draws.below(10)
        if shape < 3:
            return f"{self._draws.pick(self._modifiers)} {noun}"
        if shape == 3:
            return f"{self._proper(_BRAND_ENDS)} {noun}"
        return noun

    def city(self) -> str:
        city = self._draws.pick(self._cities)
        if self._draws.chance(0.5):
            city = self._proper(_CITY_ENDS)
        if self._draws.chance(0.2):
            return f"{self._draws.pick(self._prefixes)} {city}"
        return city

    def quantity(self) -> str:
        return str(self._draws.pick(self._quantities))

    def _two_apart(self, draw: Callable[[], str]) -> tuple[str, str]:
        """Draw an answer and a distractor that shares no word with it."""
        answer = distractor = draw()
        while set(answer.split()) & set(distractor.split()):
            distractor = draw()
        return answer, distractor

    def row(self, pattern: str) -> dict[str, str]:
        """Fill one pattern and write its answer."""
        name, name2 = self._two_apart(self.name)
        item, item2 = self._two_apart(self.item)
        city, city2 = self._two_apart(self.city)
        qty, qty2 = self._two_apart(self.quantity)
        day, day2 = self._draws.shuffled(DAYS)[:2]
        prompt = pattern.format(
            name=name,
            name2=name2,
            item=item,
            item2=item2,
            city=city,
            city2=city2,
            qty=qty,
            qty2=qty2,
            day=day,
            day2=day2,
            order=10_000 + self._draws.below(90_000),
            phone=f"555-0{100 + self._draws.below(900)}",
        )
        answer = dict(zip(KEYS, (name, item, int(qty), city, day), strict=True))
        return {"prompt": prompt, "completion": json.dumps(answer, separators=(",", ":"))}


def generate(seed: int, *, train_rows: int, test_rows: int, pattern_rows: int) -> OrderData:
    """Make the demo's data; the same seed gives the same rows on every machine.

    Args:
        seed: Chooses the rows and which listed words, numbers and inventions are held out.
        train_rows: Number of rows to learn from.
        test_rows: Number of rows with held-out values in the training patterns.
        pattern_rows: Number of rows with held-out values in the new patterns.

    Returns:
        The three lists; no sentence occurs twice in all of them.
    """
    draws = _Draws(seed)
    known = _Values(draws, seed=seed, held_out=False)
    unseen = _Values(draws, seed=seed, held_out=True)
    return OrderData(
        train=_rows(known, draws, TRAIN_PATTERNS, train_rows),
        test=_rows(unseen, draws, TRAIN_PATTERNS, test_rows),
        new_patterns=_rows(unseen, draws, NEW_PATTERNS, pattern_rows),
    )


def _rows(
    values: _Values, draws: _Draws, patterns: Sequence[str], count: int
) -> list[dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    pending: list[str] = []
    while len(rows) < count:
        # Rounds over all patterns: each is used equally often, give or take one.
        pending = pending or draws.shuffled(patterns)
        row = values.row(pending.pop())
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def write_jsonl(rows: Sequence[dict[str, str]], path: str | Path) -> None:
    """Write the rows as UTF-8 JSON lines, the same bytes on every platform."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_bytes(text.encode())
