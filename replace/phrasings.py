"""The wording of recall episodes: a fact as it stands in the text, and the question that its value completes.

`{key}` names the fact, `{value}` is the answer. Train, dev and test share no wording; a phrasing that the unswapped
default teacher could not answer is not here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """One way to state a fact and to ask for it; the answer follows `question` after a space."""

    needle: str
    question: str


PLACES = [
    "harbour",
    "library",
    "bakery",
    "mill",
    "chapel",
    "museum",
    "theatre",
    "station",
    "garden",
    "castle",
    "school",
    "hotel",
    "lighthouse",
    "brewery",
    "market",
    "stable",
    "tavern",
    "hospital",
    "workshop",
    "cellar",
    "tower",
    "bridge",
    "laundry",
    "orchard",
    "barracks",
]

SIDES = ("north", "south", "old", "new", "upper", "lower")

CITIES = [
    "Lisbon",
    "Oslo",
    "Vienna",
    "Prague",
    "Athens",
    "Dublin",
    "Warsaw",
    "Cairo",
    "Lima",
    "Tokyo",
    "Havana",
    "Geneva",
    "Madrid",
    "Berlin",
    "Helsinki",
    "Ankara",
    "Nairobi",
    "Quito",
    "Manila",
    "Seoul",
    "Toronto",
    "Chicago",
    "Sydney",
    "Bogota",
    "Budapest",
    "Zagreb",
    "Riga",
    "Tunis",
    "Delhi",
    "Bangkok",
    "Denver",
    "Boston",
    "Dallas",
    "Houston",
    "Miami",
    "Seattle",
    "Montreal",
    "Naples",
    "Venice",
    "Florence",
    "Munich",
    "Hamburg",
    "Cologne",
    "Leipzig",
    "Lyon",
    "Marseille",
    "Bordeaux",
    "Seville",
    "Valencia",
    "Porto",
    "Antwerp",
    "Utrecht",
    "Bergen",
    "Aarhus",
    "Glasgow",
    "Cardiff",
    "Bristol",
    "Leeds",
    "Osaka",
    "Kyoto",
    "Lahore",
    "Karachi",
    "Mumbai",
    "Jakarta",
    "Perth",
    "Santiago",
    "Caracas",
    "Kingston",
    "Dakar",
    "Accra",
    "Lagos",
    "Tehran",
    "Baghdad",
]

WORDS = [
    "amber",
    "anchor",
    "apple",
    "arrow",
    "basket",
    "beaver",
    "bell",
    "butter",
    "button",
    "candle",
    "canyon",
    "carpet",
    "castle",
    "cedar",
    "cherry",
    "cloud",
    "clover",
    "copper",
    "cotton",
    "crystal",
    "dagger",
    "diamond",
    "dolphin",
    "dragon",
    "eagle",
    "falcon",
    "feather",
    "fiddle",
    "flute",
    "forest",
    "ginger",
    "glove",
    "hammer",
    "harp",
    "helmet",
    "honey",
    "ivory",
    "jacket",
    "kettle",
    "ladder",
    "lantern",
    "lemon",
    "lion",
    "magnet",
    "maple",
    "marble",
    "meadow",
    "melon",
    "mirror",
    "needle",
    "onion",
    "orange",
    "paper",
    "pearl",
    "pepper",
    "piano",
    "pillow",
    "planet",
    "pocket",
    "pumpkin",
    "rabbit",
    "raven",
    "ribbon",
    "river",
    "rocket",
    "saddle",
    "salmon",
    "shadow",
    "silver",
    "spider",
    "sugar",
    "sunset",
    "temple",
    "thunder",
    "ticket",
    "tiger",
    "timber",
    "tulip",
    "turtle",
    "velvet",
    "violin",
    "walnut",
    "whale",
    "window",
    "winter",
    "wizard",
    "zebra",
]

# In a pass key's wording {key} is empty, or " of the <place>" where several facts of the form stand in one text.
PHRASINGS: dict[str, dict[str, list[Phrasing]]] = {
    "passkey": {
        "train": [
            Phrasing(
                "The pass key{key} is {value}. Remember it.",
                "What is the pass key{key}? The pass key{key} is",
            ),
            Phrasing("Remember this: the access number{key} is {value}.", "The access number{key} is"),
            Phrasing("The door code{key} was set to {value}.", "The door code{key} was set to"),
            Phrasing(
                "Please note that the PIN{key} is {value}.",
                "Question: what is the PIN{key}?\nAnswer: the PIN{key} is",
            ),
            Phrasing("The combination{key} is {value}; do not forget it.", "The combination{key} is"),
            Phrasing(
                "The magic number{key} mentioned here is {value}.",
                "The magic number{key} mentioned in the text is",
            ),
            Phrasing(
                "They chose {value} as the unlock code{key}.", "The unlock code{key} that they chose is"
            ),
            Phrasing("The ticket number{key} is {value}.", "As stated above, the ticket number{key} is"),
            Phrasing("Write down the serial number{key}: {value}.", "The serial number{key}:"),
            Phrasing(
                "Here is the password{key}: {value}.",
                "Q: Tell me the password{key}.\nA: Here is the password{key}:",
            ),
            Phrasing("The number to dial{key} is {value}.", "The number to dial{key} is"),
            Phrasing("Only {value} opens the lock{key}.", "The number that opens the lock{key} is"),
        ],
        "dev": [
            Phrasing("The vault{key} answers to the digits {value}.", "The vault{key} answers to the digits"),
            Phrasing("My reference{key} is {value}.", "My reference{key} is"),
        ],
        "test": [
            Phrasing("The secret code{key} is {value}. Keep it in mind.", "The secret code{key} is"),
            Phrasing("For the safe{key} you must enter {value}.", "For the safe{key} you must enter"),
            Phrasing(
                "The agent{key} whispered the hidden number, {value}.",
                "The hidden number that the agent{key} whispered was",
            ),
            Phrasing(
                "An envelope{key} was marked with the figure {value}.",
                "The envelope{key} was marked with the figure",
            ),
            Phrasing("To enter, type the security digits{key}, {value}.", "The security digits{key} are"),
        ],
    },
    "key_value": {
        "train": [
            Phrasing("The password for {key} is {value}.", "The password for {key} is"),
            Phrasing(
                "In this code the word {key} stands for {value}.", "In this code the word {key} stands for"
            ),
            Phrasing(
                "Whoever says {key} must be answered with {value}.",
                "Whoever says {key} must be answered with",
            ),
            Phrasing(
                "The partner of {key} is {value}.",
                "Which word is the partner of {key}? The partner of {key} is",
            ),
            Phrasing("Please remember that {key} goes with {value}.", "As I said, {key} goes with"),
            Phrasing("On the list, {key} is paired with {value}.", "On the list, {key} is paired with"),
            Phrasing(
                "The opposite of {key} in their game was {value}.", "The opposite of {key} in their game was"
            ),
            Phrasing("The label {key} means {value}.", "The label {key} means"),
            Phrasing("The entry under {key} reads {value}.", "The entry under {key} reads"),
            Phrasing(
                "They traded {key} for {value}.",
                "Question: for what did they trade {key}?\nAnswer: they traded {key} for",
            ),
            Phrasing("The key {key} maps to the value {value}.", "The key {key} maps to the value"),
        ],
        "dev": [
            Phrasing("Under the sign {key} you find {value}.", "Under the sign {key} you find"),
            Phrasing("Room {key} contains {value}.", "Room {key} contains"),
        ],
        "test": [
            Phrasing("The secret name of {key} is {value}.", "The secret name of {key} is"),
            Phrasing("When you hear {key}, reply {value}.", "When you hear {key}, reply"),
            Phrasing("The box marked {key} holds {value}.", "The box marked {key} holds"),
            Phrasing(
                "The translation of {key} is {value}.", "How is it translated? The translation of {key} is"
            ),
            Phrasing("Agent {key} uses the cover name {value}.", "Agent {key} uses the cover name"),
        ],
    },
    "sentence": {
        "train": [
            Phrasing("The special number for {key} is {value}.", "The special number for {key} is"),
            Phrasing("In {key} there are exactly {value} lamps.", "The number of lamps in {key} is exactly"),
            Phrasing(
                "The train to {key} carries {value} crates.", "The number of crates on the train to {key} is"
            ),
            Phrasing(
                "The record for {key} shows {value} visitors.",
                "How many visitors does the record for {key} show? It shows",
            ),
            Phrasing("The office in {key} has the number {value}.", "The office in {key} has the number"),
            Phrasing("The library of {key} owns {value} maps.", "The library of {key} owns"),
            Phrasing("The account of {key} holds {value} coins.", "The account of {key} holds"),
            Phrasing(
                "Parcel {value} was sent to {key}.", "The number of the parcel that was sent to {key} is"
            ),
            Phrasing(
                "The winner from {key} scored {value} points.",
                "The points that the winner from {key} scored:",
            ),
            Phrasing("The distance to {key} is {value} steps.", "The distance to {key} is"),
            Phrasing(
                "The area code of {key} is {value}.", "Question: what is the area code of {key}?\nAnswer:"
            ),
        ],
        "dev": [
            Phrasing("The factory in {key} made {value} bells.", "The factory in {key} made"),
            Phrasing(
                "The phone number of the inn in {key} is {value}.", "The phone number of the inn in {key} is"
            ),
        ],
        "test": [
            Phrasing("The magic figure of {key} is {value}.", "The magic figure of {key} is"),
            Phrasing("A census counted {value} cats in {key}.", "The number of cats counted in {key} was"),
            Phrasing(
                "The ship from {key} bears the registration {value}.",
                "The ship from {key} bears the registration",
            ),
            Phrasing("The archive in {key} keeps {value} letters.", "The archive in {key} keeps"),
            Phrasing(
                "The ticket to {key} costs {value} crowns.", "The price of the ticket to {key} in crowns is"
            ),
        ],
    },
}
