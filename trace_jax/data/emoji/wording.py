"""How people say what an emoji shows: the hand-written tables, and small grammar helpers.

A picture has a canonical caption ("a woman firefighter with dark skin") and one in other words
("a female fire fighter, dark skin tone"). In the tables below a wording is

    firefighter     a noun, said of someone: "a woman firefighter"
    +surfing        what someone does:       "a woman surfing"
    ^deaf           an adjective:            "a deaf woman"
    =a prince       all there is to say:     "a prince"
"""

from __future__ import annotations

import re

TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}
"""Skin tone modifier -> its name; a drawing without one is yellow, and its captions say nothing."""

TONES_ES = {
    "light": "claro",
    "medium-light": "claro medio",
    "medium": "medio",
    "medium-dark": "oscuro medio",
    "dark": "oscuro",
}
TONES_FR = {
    "light": "claire",
    "medium-light": "moyennement claire",
    "medium": "légèrement mate",
    "medium-dark": "mate",
    "dark": "foncée",
}

# concept | kind of edit it takes part in | canonical | other words | what they work with (if known)
_PEOPLE = """
health worker|job|health worker|doctor|stethoscope
student|job|student|graduate|pencil
teacher|job|teacher|schoolteacher|books
judge|job|judge|magistrate|balance scale
farmer|job|farmer|farm worker|tractor
cook|job|cook|chef|cooking
mechanic|job|mechanic|repair worker|wrench
factory worker|job|factory worker|industrial worker|
office worker|job|office worker|office clerk|briefcase
scientist|job|scientist|lab researcher|microscope
technologist|job|technologist|computer programmer|laptop
singer|job|singer|rock star|microphone
artist|job|artist|painter|artist palette
pilot|job|pilot|plane captain|airplane
astronaut|job|astronaut|space traveller|rocket
firefighter|job|firefighter|fire fighter|fire engine
police officer|job|police officer|cop|police car
detective|job|detective|private investigator|magnifying glass tilted left
guard|job|guard|palace sentry|
construction worker|job|construction worker|builder|hammer
wearing turban|outfit|+wearing a turban|+with a cloth wound round {her} head|
in tuxedo|outfit|+in a tuxedo|+in a dinner jacket|
with veil|outfit|+with a veil|+dressed for a wedding|
feeding baby|care|+feeding a baby|+giving a baby the bottle|
pregnant|care|^pregnant|+expecting a baby|
breast-feeding|care|=a mother breast-feeding a baby|=a baby drinking at the breast|
ninja||ninja|stealthy fighter|
with crown|outfit|+with a crown|+of royal blood|
prince||=a prince|=the son of a king|
princess||=a princess|=the daughter of a king|
with skullcap|outfit|+with a skullcap|+in a small round cap|
with headscarf|outfit|+with a headscarf|+wearing a hijab|
frowning|gesture|+frowning|+looking unhappy|
pouting|gesture|+pouting|+in a sulky mood|
gesturing NO|gesture|+gesturing no|+crossing both arms to say no|
gesturing OK|gesture|+gesturing OK|+making a circle with both arms|
tipping hand|gesture|+tipping a hand|+at an information desk|
raising hand|gesture|+raising a hand|+with one arm up|
deaf|looks|^deaf|+who cannot hear|
bowing|gesture|+bowing|+with {her} head bent down low|
facepalming|gesture|+facepalming|+covering {her} face with a hand|
shrugging|gesture|+shrugging|+who does not know|
getting massage|activity|+getting a massage|+having a head massage|
getting haircut|activity|+getting a haircut|+at the hairdresser's|
walking|activity|+walking|walker|
standing|activity|+standing|+upright on both feet|
kneeling|activity|+kneeling|+down on both knees|
with white cane|activity|+using a white cane|+finding the way with a cane|
in motorized wheelchair|activity|+using a motorized wheelchair|+in an electric wheelchair|
in manual wheelchair|activity|+using a manual wheelchair|+in a hand-pushed wheelchair|
running|activity|+running|runner|
dancing|activity|+dancing|dancer|
in steamy room|activity|+sitting in a steamy room|+enjoying a sauna|
climbing|activity|+climbing|rock climber|
in suit levitating||+in a suit, levitating|+floating in a suit|
taking bath||+taking a bath|+lying in the bathtub|
in bed||+in bed|+tucked in for the night|
in lotus position|activity|+sitting in the lotus position|+meditating with crossed legs|
horse racing||=a jockey racing a horse|=a rider on a racehorse|
fencing||+fencing|fencer|
skier||skier|+going down a slope on skis|
snowboarder||snowboarder|+on a snowboard|
golfing|sport|+playing golf|golfer|
surfing|sport|+surfing|surfer|
rowing boat|sport|+rowing a boat|rower|canoe
swimming|sport|+swimming|swimmer|
bouncing ball|sport|+bouncing a ball|basketball player|basketball
lifting weights|sport|+lifting weights|weightlifter|
biking|sport|+riding a bicycle|cyclist|bicycle
mountain biking|sport|+riding a mountain bike|mountain biker|
cartwheeling|sport|+doing a cartwheel|gymnast|
playing water polo|sport|+playing water polo|water polo player|
playing handball|sport|+playing handball|handball player|
juggling|sport|+juggling|juggler|
baby angel||=a baby angel|=a little child with a halo|
santa claus||=Santa Claus|=Father Christmas|
mrs. claus||=Mrs. Claus|=Mother Christmas|
mx claus||=Mx Claus|=a Christmas figure in a red hat|
superhero|fantasy|superhero|hero in a cape|
supervillain|fantasy|supervillain|evil mastermind|
mage|fantasy|mage|wizard|magic wand
fairy|fantasy|fairy|pixie with wings|
vampire|fantasy|vampire|Dracula|
merperson|fantasy|merperson|sea person with a fish tail|
elf|fantasy|elf|forest elf with pointed ears|
genie|spirit|genie|spirit from a lamp|
zombie|spirit|zombie|walking dead|
baby||=a baby|=an infant|
child|age|child|kid|
adult|age|+|=a grown-up|
older|age|+|+|
: blond hair|hair|+with blond hair|+whose hair is blond|
: beard|hair|+with a beard|+with a hairy chin|
: red hair|hair|+with red hair|redhead|
: curly hair|hair|+with curly hair|+with a head full of curls|
: white hair|hair|+with white hair|+whose hair is white|
: bald|hair|^bald|+without any hair|
"""

_HANDS = """
waving hand|a waving hand|a palm that says hello
raised back of hand|the back of a hand|a hand seen from behind
hand with fingers splayed|a hand with spread fingers|five fingers held apart
raised hand|a raised hand|a flat palm that says stop
vulcan salute|a Vulcan salute|fingers parted in the middle
rightwards hand|a hand reaching right|a hand held out to the right
leftwards hand|a hand reaching left|a hand held out to the left
palm down hand|a palm facing down|a hand letting something fall
palm up hand|a palm facing up|a hand offering something
leftwards pushing hand|a hand pushing left|a flat palm pressing to the left
rightwards pushing hand|a hand pushing right|a flat palm pressing to the right
ok hand|an OK sign|a ring of thumb and finger
pinched fingers|pinched fingers|fingertips held together
pinching hand|a pinching hand|two fingers showing a small amount
victory hand|a victory sign|two fingers in a V
crossed fingers|crossed fingers|fingers hoping for luck
hand with index finger and thumb crossed|a finger heart|thumb and finger crossed
love-you gesture|a love-you sign|fingers that say I love you
sign of the horns|the sign of the horns|a rock and roll hand
call me hand|a call me hand|a hand held like a phone
backhand index pointing left|a finger pointing left|an index finger to the left
backhand index pointing right|a finger pointing right|an index finger to the right
backhand index pointing up|a finger pointing up|the back of a hand pointing up
backhand index pointing down|a finger pointing down|an index finger to the ground
index pointing up|a raised index finger|one finger held up
index pointing at the viewer|a finger pointing at you|an index finger at the viewer
middle finger|a middle finger|a rude finger
thumbs up|a thumbs up|a thumb that says yes
thumbs down|a thumbs down|a thumb that says no
raised fist|a raised fist|a fist in the air
oncoming fist|an oncoming fist|a fist coming at you
left-facing fist|a fist facing left|a fist moving to the left
right-facing fist|a fist facing right|a fist moving to the right
clapping hands|clapping hands|hands giving applause
raising hands|two raised hands|hands held up in joy
heart hands|hands making a heart|a heart formed by two hands
open hands|open hands|two palms ready for a hug
palms up together|palms up together|two cupped hands
handshake|a handshake|two hands closing a deal
folded hands|folded hands|hands pressed in prayer
writing hand|a writing hand|a hand with a pen
nail polish|nail polish on a hand|painted fingernails
selfie|a hand taking a selfie|a raised hand with a phone
flexed biceps|a flexed arm|a strong muscle
leg|a leg|a bent leg
foot|a foot|a bare foot
ear|an ear|an ear that listens
ear with hearing aid|an ear with a hearing aid|a hearing device in an ear
nose|a nose|a nose that smells
women holding hands|two women holding hands|a pair of women hand in hand
men holding hands|two men holding hands|a pair of men hand in hand
woman and man holding hands|a woman and a man holding hands|a man and a woman hand in hand
people holding hands|two people holding hands|a pair hand in hand
kiss|two people kissing|a couple sharing a kiss
kiss: woman, man|a woman and a man kissing|a man and a woman sharing a kiss
kiss: man, man|two men kissing|a pair of men sharing a kiss
kiss: woman, woman|two women kissing|a pair of women sharing a kiss
couple with heart|a couple with a heart|two people in love
couple with heart: woman, man|a woman and a man with a heart|a man and a woman in love
couple with heart: man, man|two men with a heart|a pair of men in love
couple with heart: woman, woman|two women with a heart|a pair of women in love
"""


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = (line.split("|") for line in text.strip().splitlines())
    return {row[0]: tuple(row[1:]) for row in rows}


PEOPLE = _table(_PEOPLE)
"""Concept -> (kind of edit, canonical, other words, CLDR name of the tool or "")."""

HANDS = _table(_HANDS)
"""CLDR name -> (canonical, other words) of hands, body parts and couples."""

TOOLS = {
    "cooking": "a frying pan",
    "magnifying glass tilted left": "a magnifying glass",
    "artist palette": "a palette",
    "books": "books",
    "balance scale": "a balance scale",
}
"""CLDR name of a tool -> how a sentence says it, where the caption of the drawing is too long."""

GENDERS = {"woman": ("woman", "female", "lady"), "man": ("man", "male", "gentleman")}
_MER = {"woman": "a mermaid", "man": "a merman", "": "a merperson"}


def article(noun: str) -> str:
    """The noun with its right "a" or "an" ("an hourglass", "a unicorn")."""
    an = re.match(r"(?:[aeio]|u(?!ni|ti|se)|hour|x-ray)", noun)
    if re.match(r"(?:one|eu|once)", noun):
        an = None
    return f"{'an' if an else 'a'} {noun}"


def capital(text: str) -> str:
    """The text with its first letter as a capital, the rest as it is."""
    return text[:1].upper() + text[1:]


def someone(wording: str, gender: str, register: int) -> str:
    """Says a wording of the people table of a woman, a man or (`gender` "") a person.

    `register` chooses among woman/female/lady and man/male/gentleman: 0 canonical, 1 other words.
    """
    if wording.startswith("="):
        return wording[1:]
    names = GENDERS.get(gender, ("person", "", "person"))
    who = names[0] if register == 0 else names[2]
    pronoun = {"woman": "her", "man": "his"}.get(gender, "their")
    if wording.startswith("+"):
        return f"a {who} {wording[1:]}".rstrip().replace("{her}", pronoun)
    if wording.startswith("^"):
        return f"{article(wording[1:])} {who}"
    if wording == "merperson":
        return _MER[gender]
    return article(f"{names[0 if register == 0 else 1]} {wording}" if gender else wording)


def with_tone(caption: str, tones: tuple[str, ...], canonical: bool, aside: bool) -> str:
    """Adds the skin tones to a caption; `aside` puts a comma before the canonical form."""
    if not tones:
        return caption
    said = " and ".join(dict.fromkeys(tones))
    if canonical and aside and re.search(r" with (?:a |[a-z]+ hair)", caption):
        return f"{caption} and {said} skin"
    if canonical:
        return f"{caption}{',' if aside else ''} with {said} skin"
    return f"{caption}, {said} skin tone{'s' if ' and ' in said else ''}"


_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


_MINUTES = {5: "five", 10: "ten", 15: "a quarter", 20: "twenty", 25: "twenty-five", 30: "half"}


def time_words(minutes: int) -> str:
    """The time so many minutes, a multiple of five, after twelve: "half past four", "a quarter to nine"."""
    hours, past = divmod(minutes, 60)
    hour, following = (_NUMBERS[number % 12 or 12] for number in (hours, hours + 1))
    if not past:
        return f"{hour} o'clock"
    return f"{_MINUTES[past]} past {hour}" if past <= 30 else f"{_MINUTES[60 - past]} to {following}"


def clock_words(half_hours: int) -> str:
    """The time after `half_hours` half hours past twelve: "half past four", "nine o'clock"."""
    return time_words(30 * half_hours)


def span_words(half_hours: int) -> str:
    """A span of time: "half an hour", "one hour", "two and a half hours"."""
    hours, half = divmod(half_hours, 2)
    if not hours:
        return "half an hour"
    if half:
        return f"{_NUMBERS[hours]} and a half hours"
    return f"{_NUMBERS[hours]} hour{'s' if hours > 1 else ''}"


_MASS = frozenset(
    (
        *("fire", "fog", "bread", "cheese", "coral", "broccoli", "garlic", "bacon", "popcorn", "butter"),
        *("salt", "sushi", "spaghetti", "sake", "ice", "candy", "sunrise", "sunset", "thread", "yarn"),
        *("soap", "wood", "luggage", "money", "meat", "rice", "tea", "DNA"),
    )
)
_SINGULAR_S = re.compile(r"(?:ss|us|is|os|lens|Leo)$")
_RENAMED = _table("""
rolling on the floor laughing|a face rolling on the floor laughing
star-struck|a star-struck face
dizzy|a dizzy star
dashing away|a puff of air
zzz|the sleepy letters ZZZ
ewe|a ewe
hundred points|the number 100 in red
baguette bread|a baguette
meat on bone|meat on a bone
cooking|a frying pan with an egg
mate|a cup of mate
canned food|canned food
shaved ice|shaved ice
soft ice cream|soft ice cream
bubble tea|bubble tea
camping|a camp site
mount fuji|Mount Fuji
building construction|a building under construction
wedding|a wedding chapel
tokyo tower|Tokyo Tower
statue of liberty|the Statue of Liberty
foggy|a foggy city
kaaba|the Kaaba
light rail|a light rail train
construction|a construction barrier
airplane departure|an airplane taking off
airplane arrival|an airplane landing
hourglass done|an hourglass that has run out
hourglass not done|an hourglass still running
sun|the sun
milky way|the Milky Way
high voltage|a bolt of high voltage
snowman without snow|a snowman without snow
tennis|a tennis racket and ball
bowling|a bowling ball with pins
cricket game|a cricket bat and ball
field hockey|a field hockey stick
ice hockey|an ice hockey stick
lacrosse|a lacrosse stick
ping pong|a ping pong bat
badminton|a badminton racket
performing arts|theatre masks
headphone|headphones
dvd|a DVD
dna|a strand of DNA
chart increasing|a rising chart
chart decreasing|a falling chart
chart increasing with yen|a rising chart with a yen sign
locked|a closed lock
unlocked|an open lock
locked with pen|a lock with a pen
locked with key|a lock with a key
t-rex|a T-Rex
love hotel|a love hotel
skis|skis
1st place medal|a first place medal
2nd place medal|a second place medal
3rd place medal|a third place medal
potable water|the drinking water sign
non-potable water|the no drinking water sign
no one under eighteen|the no one under eighteen sign
clockwise vertical arrows|clockwise arrows
om|the om sign
yin yang|the yin yang sign
star of david|the star of David
antenna bars|antenna bars
circled m|the letter M in a circle
splatter|a splatter
sun behind cloud|the sun behind a cloud
sun behind small cloud|the sun behind a small cloud
sun behind large cloud|the sun behind a large cloud
sun behind rain cloud|the sun behind a rain cloud
people hugging|two people hugging
people with bunny ears|two people with bunny ears
men with bunny ears|two men with bunny ears
women with bunny ears|two women with bunny ears
people wrestling|two people wrestling
men wrestling|two men wrestling
women wrestling|two women wrestling
umbrella on ground|an umbrella on the ground
flag in hole|a golf flag in a hole
""")


def thing(name: str, group: str, subgroup: str) -> str:
    """The CLDR name of a thing as a caption, with the article that English wants."""
    if name.lower() in _RENAMED:
        return _RENAMED[name.lower()][0]
    if name.startswith("family: "):
        return f"a family: {name[8:]}"
    if subgroup == "zodiac":
        return f"the star sign {name}"
    if subgroup == "keycap":
        return f"the number {name[8:]} key" if name[8:].isdigit() else f"the {name[8:]} key"
    if subgroup == "alphanum" and not name.endswith("button") and "(" not in name:
        return f"the {name} sign"
    if subgroup in ("transport-sign", "warning", "av-symbol", "math", "gender", "currency"):
        return f"the {name}" if re.search(r"(button|sign|symbol)$", name) else f"the {name} sign"
    if name in ("copyright", "registered", "trade mark", "place of worship"):
        return f"the {name} sign"
    if re.search(r"(button|symbol|sign|\))$", name) or re.match(r"[A-Z]+!? arrow", name):
        return f"the {name}"
    head = re.split(r" (?:with|in|on|of|for|and|at|behind|under|showing|over) ", name)[0]
    last = head.split()[-1]
    if name in _MASS or head in _MASS or last in ("sunrise", "sunset", "rice", "tea"):
        return name
    if last.endswith("s") and not _SINGULAR_S.search(last):
        return name
    return article(name)
